"""What the autoencoders with a likelihood share: the bound in bits, its baseline, pictures.

Shapes: B batch, V variables, Z patches, P values in a patch.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from distpc.data.pictures import three_channels, to_display, to_grid
from distpc.data.spec import DatasetSpec
from distpc.teachers.images import ImageTeacher
from distpc.teachers.patch_nets import PatchDecoder, PatchEncoder
from distpc.teachers.trainable import Trainable, entropy_bits, histogram

_SIDE = 56


class PatchCoder(ImageTeacher, Trainable):
    """Encoder over the patch grid, decoder of single patches.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        width: of encoder and decoder.
        encoder_blocks: residual blocks of the encoder.
        num_mixtures: logistics that are mixed for a value.
        code_width: of what the decoder sees of a patch.
    """

    figure = "bpd"

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        width: int,
        encoder_blocks: int,
        num_mixtures: int,
        code_width: int,
    ) -> None:
        super().__init__(spec, patch_size)
        num_values = self.grid.variables_per_patch
        self.encoder = PatchEncoder(num_values, width, encoder_blocks)
        self.decoder = PatchDecoder(code_width, width, num_values, num_mixtures)
        self.encoder_blocks = encoder_blocks

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """x (B, V) -> (B, Z, code width): what the decoder is given of each patch, no noise."""

    @property
    def sees(self) -> str:
        """Convolutions reach around the patch."""
        side = 2 * self.encoder_blocks + 1
        return f"the {side} x {side} patches around its own"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, D) float32."""
        return self.codes(x)

    def nats(self, codes: Tensor, values: Tensor) -> Tensor:
        """-log p(x | codes): codes (B, Z, D), values (B, Z, P) in [0, 1] -> (B,)."""
        largest = self.largest_values[self.patch_variables]
        return self.decoder.nats(codes, values, largest).sum(dim=(1, 2))

    def statistics(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """How often each value occurs, over all variables."""
        return histogram(x, int(self.largest_values.max()) + 1)

    def baseline(self, sums: Tensor) -> float:
        """Bits of a value under the best distribution that is the same for all variables."""
        return entropy_bits(sums)

    @torch.no_grad()
    def picture(self, x: Tensor, generator: torch.Generator) -> np.ndarray | None:
        """Originals, and the means of the decoder."""
        rebuilt = self.decoder.means(self.codes(x)).clamp(0, 1)
        flat = torch.empty(len(x), self.spec.num_variables, device=rebuilt.device)
        flat[:, self.patch_variables] = rebuilt
        values = (flat * self.largest_values).round().long().cpu()
        both = torch.cat([x.cpu(), values]).numpy()
        shown = three_channels(to_display(both, self.spec))
        return to_grid(shown, columns=len(x), gap=2, min_side=_SIDE)
