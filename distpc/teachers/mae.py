"""The masked autoencoder: a small vision transformer trained to fill in hidden patches.

After He et al. 2022 with the choices of the distillation literature: masking ratio drawn per
batch, error over all patches, features from an encoder that sees a patch's neighbourhood only.
Shapes: B batch, V variables, Z patches, P values in a patch, W width, D feature width,
n visible patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distpc.data.spec import DatasetSpec
from distpc.teachers.images import ImageTeacher
from distpc.teachers.trainable import Trainable, masking_ratio
from distpc.teachers.transformer import Block, grid_positions, grid_rotations

_CHUNK_FLOATS = 2**19
"""Floats in one token tensor while encoding; bounds memory at about ten times this."""


class MaskedAutoencoder(ImageTeacher, Trainable):
    """Encoder on visible patches, bottleneck of width D, decoder with mask tokens.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        width: W of the token vectors.
        num_heads: attention heads a block.
        encoder_blocks: blocks of the encoder.
        decoder_blocks: blocks of the decoder.
        feature_width: D of the bottleneck.
        neighbourhood: 1 or 3; `encode` shows a patch alone, or the 3 x 3 patches around it.
    """

    kind = "mae"
    sizes = (
        "width",
        "num_heads",
        "encoder_blocks",
        "decoder_blocks",
        "feature_width",
        "neighbourhood",
    )
    figure = "mse"
    baseline_name = "variance"
    positions: Tensor
    rotations: Tensor
    neighbours: Tensor
    neighbour_present: Tensor

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        width: int,
        num_heads: int,
        encoder_blocks: int,
        decoder_blocks: int,
        feature_width: int,
        neighbourhood: int,
    ) -> None:
        super().__init__(spec, patch_size)
        self._settings = {
            "width": width,
            "num_heads": num_heads,
            "encoder_blocks": encoder_blocks,
            "decoder_blocks": decoder_blocks,
            "feature_width": feature_width,
            "neighbourhood": neighbourhood,
        }
        num_values = self.grid.variables_per_patch
        self.embed = nn.Linear(num_values, width)
        self.encoder = nn.ModuleList([Block(width, num_heads) for _ in range(encoder_blocks)])
        self.encoder_norm = nn.LayerNorm(width)
        self.to_feature = nn.Linear(width, feature_width)
        self.from_feature = nn.Linear(feature_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.decoder = nn.ModuleList([Block(width, num_heads) for _ in range(decoder_blocks)])
        self.decoder_norm = nn.LayerNorm(width)
        self.to_values = nn.Linear(width, num_values)
        positions = grid_positions(self.grid.rows, self.grid.columns, width)
        neighbours, present = _neighbours(self.grid.rows, self.grid.columns, neighbourhood)
        rotations = grid_rotations(self.grid.rows, self.grid.columns, width // num_heads)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("rotations", rotations, persistent=False)
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.register_buffer("neighbour_present", present, persistent=False)

    @property
    def feature_width(self) -> int:
        """D."""
        return self.to_feature.out_features

    @property
    def sees(self) -> str:
        """The patch, or the 3 x 3 patches around it."""
        alone = self._settings["neighbourhood"] == 1
        return "its patch" if alone else "the 3 x 3 patches around its own"

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """(B, n) indices of the patches that are shown; n is the same for the whole batch."""
        ratio = masking_ratio(generator, section, training)
        return (draw_visible(num_samples, self.grid.num_patches, ratio, generator),)

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V) integers, visible (B, n) -> (B, 3); loss and figure are the mean squared error
        over all values of an image, in the scale of values in [0, 1]."""
        values = self.patches(x)
        error = (self.reconstruct(values, drawn[0]) - values).square().mean(dim=(1, 2))
        return torch.stack([error, error, torch.ones_like(error)], dim=1)

    def statistics(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """Sums and sums of squares of every variable in [0, 1], and the number of samples."""
        scaled = x.double().cpu() / self.largest_values.double().cpu()
        count = torch.tensor([float(len(x))], dtype=torch.float64)
        return torch.cat([scaled.sum(dim=0), scaled.square().sum(dim=0), count])

    def baseline(self, sums: Tensor) -> float:
        """Mean over variables of the variance of values in [0, 1]."""
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        return float((square - mean.square()).mean())

    def picture(self, x: Tensor, generator: torch.Generator) -> np.ndarray | None:
        """Originals, what was shown of them, and reconstructions."""
        from distpc.teachers.pictures import reconstruction_grid

        visible = draw_visible(len(x), self.grid.num_patches, 0.5, generator)
        return reconstruction_grid(self, x, visible)

    def reconstruct(self, values: Tensor, visible: Tensor) -> Tensor:
        """values (B, Z, P) in [0, 1] of which `visible` (B, n) patches are seen -> (B, Z, P)."""
        at_visible = visible[:, :, None].expand(-1, -1, self.embed.out_features)
        tokens = self.embed(values - 0.5).gather(1, at_visible)
        seen = self.from_feature(self._features(tokens, self.rotations[visible]))
        hidden = self.mask_token.expand(values.shape[0], values.shape[1], -1)
        tokens = hidden.scatter(1, at_visible, seen) + self.positions
        for block in self.decoder:
            tokens = block(tokens)
        decoded: Tensor = self.to_values(self.decoder_norm(tokens)) + 0.5
        return decoded

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, D) float32; patch z sees itself and its neighbourhood."""
        tokens = self.embed(self.patches(x) - 0.5)
        num_images, num_patches, width = tokens.shape
        # Every (image, patch) pair is a sequence of its own: its neighbourhood, the patch first.
        chunk = max(1, _CHUNK_FLOATS // (self.neighbours.shape[1] * width))
        features = tokens.new_empty(num_images * num_patches, self.feature_width)
        for start in range(0, len(features), chunk):
            pair = torch.arange(start, min(start + chunk, len(features)), device=tokens.device)
            image, patch = pair // num_patches, pair % num_patches
            places = self.neighbours[patch]
            around = tokens[image[:, None], places]
            present = self.neighbour_present[patch]
            found = self._features(around, self.rotations[places], present)
            features[start : start + chunk] = found[:, 0]
        return features.unflatten(0, (num_images, num_patches))

    def _features(self, tokens: Tensor, rotation: Tensor, present: Tensor | None = None) -> Tensor:
        for block in self.encoder:
            tokens = block(tokens, rotation, present)
        features: Tensor = self.to_feature(self.encoder_norm(tokens))
        return features


def draw_visible(
    num_images: int, num_patches: int, mask_ratio: float, generator: torch.Generator
) -> Tensor:
    """(B, n) indices of the patches that stay visible, another random subset in every image.

    n is the nearest number to (1 - mask_ratio) * Z that is at least one.
    """
    num_visible = max(1, num_patches - round(mask_ratio * num_patches))
    scores = torch.rand(num_images, num_patches, generator=generator)
    return scores.argsort(dim=1)[:, :num_visible]


def _neighbours(rows: int, columns: int, side: int) -> tuple[Tensor, Tensor]:
    """(Z, side * side) patch indices around every patch, itself first, and which of them exist."""
    reach = side // 2
    steps = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    steps.sort(key=lambda step: step != (0, 0))
    down, right = torch.tensor(steps).T
    patch = torch.arange(rows * columns)[:, None]
    row, column = patch // columns + down, patch % columns + right
    present = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return torch.where(present, row * columns + column, patch), present
