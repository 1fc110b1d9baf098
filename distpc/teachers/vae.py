"""A variational autoencoder with a Gaussian code for every patch (Kingma & Welling 2014).

Its figure is the negative evidence lower bound in bits a dimension, KL divergence to N(0, 1)
included, by one sample of the codes: an upper bound of the model's own bits a dimension.
Shapes: B batch, V variables, Z patches, D feature width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distpc.data.spec import DatasetSpec
from distpc.teachers.patch_coder import PatchCoder
from distpc.teachers.patch_nets import bits

_LOG_SPREADS = 5.0


class VariationalAutoencoder(PatchCoder):
    """q(code | x) = N(mean, spread) a patch; the feature is the mean."""

    kind = "vae"
    sizes = ("width", "encoder_blocks", "num_mixtures", "feature_width")

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        width: int,
        encoder_blocks: int,
        num_mixtures: int,
        feature_width: int,
    ) -> None:
        sizes = {"width": width, "encoder_blocks": encoder_blocks, "num_mixtures": num_mixtures}
        super().__init__(spec, patch_size, **sizes, code_width=feature_width)
        self._settings = {**sizes, "feature_width": feature_width}
        self.to_code = nn.Conv2d(width, 2 * feature_width, 1)

    @property
    def feature_width(self) -> int:
        """D."""
        return self._settings["feature_width"]

    def codes(self, x: Tensor) -> Tensor:
        """x (B, V) -> (B, Z, D) means."""
        return self._posterior(self.patches(x))[0]

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """(B, Z, D) standard normal noise."""
        shape = num_samples, self.num_latents, self.feature_width
        return (torch.randn(shape, generator=generator),)

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V), noise (B, Z, D) -> (B, 3): the bound in bits a dimension, twice, and 1."""
        values = self.patches(x)
        mean, log_spread = self._posterior(values)
        code = mean + log_spread.exp() * drawn[0]
        divergence = (mean.square() + (2 * log_spread).exp() - 1) / 2 - log_spread
        nats = self.nats(code, values) + divergence.sum(dim=(1, 2))
        bound = bits(nats) / self.spec.num_variables
        return torch.stack([bound, bound, torch.ones_like(bound)], dim=1)

    def _posterior(self, values: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(values, self.grid.rows, self.grid.columns)
        mean, log_spread = self.to_code(maps).flatten(2).transpose(1, 2).chunk(2, dim=2)
        return mean, log_spread.clamp(-_LOG_SPREADS, _LOG_SPREADS)
