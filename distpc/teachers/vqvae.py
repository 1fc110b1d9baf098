"""A vector-quantised autoencoder of two levels (Razavi et al. 2019) with an independent decoder.

Top codes stand for 2 x 2 patches, bottom codes for a patch; the feature of a patch, and all that
the decoder sees of it, is both (Liu et al. 2023). The figure is a bound of the model's own bits a
dimension: -log2 p(x | codes) plus the bits of all codes under a prior that is trained beside them,
p(top code) p(bottom code | top code above it), the same at every place. A prior that sees the codes
around (Razavi et al. use an autoregressive one) would lower it.

Shapes: B batch, V variables, Z patches, E code width, N codes of a level, W width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, layer_norm, pad

from distpc.data.spec import DatasetSpec
from distpc.teachers.patch_coder import PatchCoder
from distpc.teachers.patch_nets import Residual, bits


class Quantiser(nn.Module):
    """Nearest of N code vectors; gradients pass straight through.

    Encodings are normalised first: code vectors drawn from N(0, 1) then lie among them from the
    start, and few of them die.
    """

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, width))

    def forward(self, encodings: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
        """encodings (B, E, h, w) -> code vectors of the same shape, which (B, h, w), loss (B,)."""
        found = encodings.movedim(1, -1)
        if found.shape[-1] > 1:
            found = layer_norm(found, found.shape[-1:])
        distance = self.codes.square().sum(dim=1) - 2 * found @ self.codes.T
        which = distance.argmin(dim=-1)
        chosen = self.codes[which]
        to_codes = (chosen - found.detach()).square().mean(dim=(1, 2, 3))
        to_encodings = (chosen.detach() - found).square().mean(dim=(1, 2, 3))
        passed = found + (chosen - found).detach()
        return passed.movedim(-1, 1), which, to_codes + commitment * to_encodings


class CodePrior(nn.Module):
    """log p of an image's codes: each top code alone, each bottom code given the top one above."""

    # Adam moves every weight by about its step size: scaled, the logits get where they belong
    # within an epoch.
    SCALE = 10.0

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.zeros(num_codes))
        self.bottom = nn.Parameter(torch.zeros(num_codes, num_codes))

    def bits(self, top: Tensor, above: Tensor, bottom: Tensor) -> Tensor:
        """Codes top (B, h, w); bottom and the top codes above them (B, H, W) -> bits (B,)."""
        of_top = (self.top * self.SCALE).log_softmax(0)[top].sum(dim=(1, 2))
        logits = (self.bottom[above] * self.SCALE).movedim(-1, 1)
        of_bottom = cross_entropy(logits, bottom, reduction="none").sum(dim=(1, 2))
        return bits(of_bottom - of_top)


class Coded(NamedTuple):
    """Codes of a batch.

    Attributes:
        vectors: (B, Z, 2 E) what the decoder sees of each patch.
        loss: (B,) what pulls codes and encodings together.
        bits: (B,) of the codes under the prior.
    """

    vectors: Tensor
    loss: Tensor
    bits: Tensor


class VectorQuantised(PatchCoder):
    """Two codebooks and the decoder.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        width, encoder_blocks, num_mixtures: sizes of the networks.
        code_width: E.
        num_codes: N, of each level.
        commitment: weight of the loss that pulls encodings to code vectors.
    """

    kind = "vqvae"
    sizes = ("width", "encoder_blocks", "num_mixtures", "code_width", "num_codes", "commitment")

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        width: int,
        encoder_blocks: int,
        num_mixtures: int,
        code_width: int,
        num_codes: int,
        commitment: float,
    ) -> None:
        sizes = {"width": width, "encoder_blocks": encoder_blocks, "num_mixtures": num_mixtures}
        super().__init__(spec, patch_size, **sizes, code_width=2 * code_width)
        self._settings = {
            **sizes,
            "code_width": code_width,
            "num_codes": num_codes,
            "commitment": commitment,
        }
        self.commitment = commitment
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.top_block = Residual(width)
        self.to_top = nn.Conv2d(width, code_width, 1)
        self.to_bottom = nn.Conv2d(width + code_width, code_width, 1)
        self.top = Quantiser(num_codes, code_width)
        self.bottom = Quantiser(num_codes, code_width)
        self.prior = CodePrior(num_codes)

    @property
    def feature_width(self) -> int:
        """D = 2 E."""
        return 2 * self.bottom.codes.shape[1]

    @property
    def sees(self) -> str:
        """The top level looks further than the bottom one."""
        return f"its patch and those at most {self.encoder_blocks + 3} away"

    def codes(self, x: Tensor) -> Tensor:
        """x (B, V) -> (B, Z, 2 E): top code of the 2 x 2 patches, code of the patch."""
        return self._coded(self.patches(x)).vectors

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """Nothing is random."""
        return ()

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V) -> (B, 3): the bound plus the codes' losses, the bound in bits a dimension,
        and 1."""
        values = self.patches(x)
        coded = self._coded(values)
        given = bits(self.nats(coded.vectors, values))
        bound = (given + coded.bits) / self.spec.num_variables
        return torch.stack([bound + coded.loss, bound, torch.ones_like(bound)], dim=1)

    def _coded(self, values: Tensor) -> Coded:
        rows, columns = self.grid.rows, self.grid.columns
        maps = self.encoder(values, rows, columns)
        even = pad(maps, (0, columns % 2, 0, rows % 2), mode="replicate")
        encodings = self.to_top(self.top_block(self.down(even)))
        top, which_top, top_loss = self.top(encodings, self.commitment)
        above = interpolate(top, scale_factor=2.0, mode="nearest")[:, :, :rows, :columns]
        joined = torch.cat([maps, above], dim=1)
        bottom, which, bottom_loss = self.bottom(self.to_bottom(joined), self.commitment)
        vectors = torch.cat([above, bottom], dim=1).flatten(2).transpose(1, 2)
        which_above = which_top.repeat_interleave(2, 1).repeat_interleave(2, 2)
        code_bits = self.prior.bits(which_top, which_above[:, :rows, :columns], which)
        return Coded(vectors, top_loss + bottom_loss, code_bits)
