"""Self-distillation after data2vec (Baevski et al. 2022): predict features of what is hidden.

A student sees part of the patches and predicts, at the hidden ones, what a slow average of itself
makes of the whole image. Shapes: B batch, V variables, Z patches, W width, n visible patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from distpc.data.spec import DatasetSpec
from distpc.teachers.images import ImageTeacher
from distpc.teachers.mae import draw_visible
from distpc.teachers.trainable import Trainable, masking_ratio
from distpc.teachers.transformer import Block, grid_rotations


class _Network(nn.Module):
    """Embedding and blocks; the mean of the last blocks' normalised outputs is what it knows."""

    def __init__(self, num_values: int, width: int, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(num_values, width)
        self.blocks = nn.ModuleList([Block(width, num_heads) for _ in range(num_blocks)])

    def forward(self, tokens: Tensor, rotations: Tensor, num_averaged: int) -> Tensor:
        """tokens (B, Z, W), rotations (B, Z, W / heads, 2) -> (B, Z, W)."""
        outputs = []
        for block in self.blocks:
            tokens = block(tokens, rotations)
            outputs.append(layer_norm(tokens, tokens.shape[-1:]))
        return torch.stack(outputs[-num_averaged:]).mean(dim=0)


class SelfDistilled(ImageTeacher, Trainable):
    """Student and slow average; the average is what encodes.

    Its figure is the mean squared error at hidden patches; targets change with training, so it is
    to be read beside `variance`, that of the targets about their mean: were they all alike, both
    would be zero.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        width: W, and the width of a feature.
        num_heads: attention heads a block.
        num_blocks: blocks.
        num_averaged: last blocks that make the target and the feature.
    """

    kind = "data2vec"
    sizes = ("width", "num_heads", "num_blocks", "num_averaged")
    figure = "mse"
    baseline_name = "variance"
    rotations: Tensor

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        width: int,
        num_heads: int,
        num_blocks: int,
        num_averaged: int,
    ) -> None:
        super().__init__(spec, patch_size)
        self._settings = {
            "width": width,
            "num_heads": num_heads,
            "num_blocks": num_blocks,
            "num_averaged": num_averaged,
        }
        self.num_averaged = num_averaged
        sizes = self.grid.variables_per_patch, width, num_heads, num_blocks
        self.student = _Network(*sizes)
        self.average = _Network(*sizes).requires_grad_(False)
        self.average.load_state_dict(self.student.state_dict())
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.predict = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        rotations = grid_rotations(self.grid.rows, self.grid.columns, width // num_heads)
        self.register_buffer("rotations", rotations, persistent=False)

    @property
    def feature_width(self) -> int:
        """D = W."""
        return self._settings["width"]

    @property
    def sees(self) -> str:
        """Attention looks everywhere."""
        return "the whole image"

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """(B, n) indices of the patches that the student sees; at least one is hidden."""
        num_patches = self.grid.num_patches
        ratio = max(masking_ratio(generator, section, training), 1 / num_patches)
        return (draw_visible(num_samples, num_patches, ratio, generator),)

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V), visible (B, n) -> (B, 3): squared error at hidden patches, twice, and 1."""
        target = self._targets(x)
        hidden = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        hidden.scatter_(1, drawn[0], False)
        tokens = self.student.embed(self.patches(x) - 0.5)
        tokens = torch.where(hidden[:, :, None], self.mask_token, tokens)
        found = self.predict(self.student(tokens, self._places(x), self.num_averaged))
        error = (found - target).square().mean(dim=2)
        # A grid of one patch has none that is hidden while another is seen.
        error = (error * hidden).sum(dim=1) / hidden.sum(dim=1).clamp(min=1)
        return torch.stack([error, error, torch.ones_like(error)], dim=1)

    def statistics(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """Sums and sums of squares of the targets, by width, and their number."""
        targets = self._targets(x).double().flatten(0, 1)
        count = targets.new_tensor([float(len(targets))])
        return torch.cat([targets.sum(dim=0), targets.square().sum(dim=0), count])

    def baseline(self, sums: Tensor) -> float:
        """Variance of the targets about their mean over samples and patches."""
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        return float((square - mean.square()).mean())

    @torch.no_grad()
    def after_step(self, progress: float, section: Any) -> None:
        """Move the slow average a little towards the student."""
        decay = section.decay_first + progress * (section.decay_last - section.decay_first)
        slow, fast = self.average.parameters(), self.student.parameters()
        for old, new in zip(slow, fast, strict=True):
            old.lerp_(new, 1 - decay)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, W) float32."""
        return self._targets(x)

    @torch.no_grad()
    def _targets(self, x: Tensor) -> Tensor:
        tokens = self.average.embed(self.patches(x) - 0.5)
        known: Tensor = self.average(tokens, self._places(x), self.num_averaged)
        return known

    def _places(self, x: Tensor) -> Tensor:
        return self.rotations.expand(len(x), -1, -1, -1)
