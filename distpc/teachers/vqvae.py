"""A vector-quantised autoencoder of two levels (Razavi et al. 2019) with an independent decoder.

Top codes stand for 2 x 2 patches, bottom codes for a patch; the feature of a patch, and all that
the decoder sees of it, is both (Liu et al. 2023). The figure is a bound of the model's own bits a
dimension: -log2 p(x | codes) plus the bits of all codes under a uniform prior over each codebook.
A prior fitted to the codes would lower it. Shapes: B batch, V variables, Z patches, E code width,
N codes of a level, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm, pad

from distpc.config.teachers import TeacherConfig
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

    def forward(self, encodings: Tensor, commitment: float) -> tuple[Tensor, Tensor]:
        """encodings (B, E, h, w) -> code vectors of the same shape, and the loss (B,)."""
        found = encodings.movedim(1, -1)
        if found.shape[-1] > 1:
            found = layer_norm(found, found.shape[-1:])
        distance = self.codes.square().sum(dim=1) - 2 * found @ self.codes.T
        chosen = self.codes[distance.argmin(dim=-1)]
        to_codes = (chosen - found.detach()).square().mean(dim=(1, 2, 3))
        to_encodings = (chosen.detach() - found).square().mean(dim=(1, 2, 3))
        passed = found + (chosen - found).detach()
        return passed.movedim(-1, 1), to_codes + commitment * to_encodings


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

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> VectorQuantised:
        """Sizes from `teacher.vqvae`; `seed` draws the initial weights."""
        sizes = config.vqvae
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(
                spec,
                patch_size,
                width=sizes.width,
                encoder_blocks=sizes.encoder_blocks,
                num_mixtures=sizes.num_mixtures,
                code_width=sizes.code_width,
                num_codes=sizes.num_codes,
                commitment=sizes.commitment,
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Sizes of the networks and codebooks."""
        return dict(self._settings)

    @property
    def feature_width(self) -> int:
        """D = 2 E."""
        return 2 * self.bottom.codes.shape[1]

    @property
    def sees(self) -> str:
        """The top level looks further than the bottom one."""
        return f"its patch and those at most {self.encoder_blocks + 3} away"

    @property
    def code_bits(self) -> float:
        """Bits of an image's codes under the uniform prior."""
        rows, columns = (self.grid.rows + 1) // 2, (self.grid.columns + 1) // 2
        return (self.num_latents + rows * columns) * math.log2(len(self.top.codes))

    def codes(self, x: Tensor) -> Tensor:
        """x (B, V) -> (B, Z, 2 E): top code of the 2 x 2 patches, code of the patch."""
        return self._quantised(self.patches(x))[0]

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """Nothing is random."""
        return ()

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V) -> (B, 3): bits a dimension given the codes plus the codes' losses, the bound in
        bits a dimension, and 1."""
        values = self.patches(x)
        codes, code_loss = self._quantised(values)
        given = bits(self.nats(codes, values)) / self.spec.num_variables
        bound = given + self.code_bits / self.spec.num_variables
        return torch.stack([given + code_loss, bound, torch.ones_like(bound)], dim=1)

    def _quantised(self, values: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.grid.rows, self.grid.columns
        maps = self.encoder(values, rows, columns)
        even = pad(maps, (0, columns % 2, 0, rows % 2), mode="replicate")
        top, top_loss = self.top(self.to_top(self.top_block(self.down(even))), self.commitment)
        above = interpolate(top, scale_factor=2.0, mode="nearest")[:, :, :rows, :columns]
        joined = torch.cat([maps, above], dim=1)
        bottom, bottom_loss = self.bottom(self.to_bottom(joined), self.commitment)
        codes = torch.cat([above, bottom], dim=1).flatten(2).transpose(1, 2)
        return codes, top_loss + bottom_loss
