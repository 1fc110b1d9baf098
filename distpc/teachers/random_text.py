"""The control `random` of text: random vectors of a token's context, nothing in them learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers.texts import Sees, TextTeacher

DECAY = 0.5
"""Weight of a token's vector in the feature of its neighbour; its square one further, and so on."""


class RandomTextTeacher(TextTeacher):
    """Features sum_s DECAY^|t - s| W[x_s] over the tokens s that position t may see.

    Says how much of a language model's worth needs no learning at all: what a cluster holds are
    contexts that share their nearest tokens. Built by `RandomTeacher` where the data are text.

    Args:
        spec: the data set.
        width: D, width of a feature.
        seed: of the Gaussian vectors W, which are kept as weights.
        sees: prefix, suffix or both.
    """

    kind = "random_text"
    vectors: Tensor

    def __init__(
        self, spec: DatasetSpec, patch_size: int, *, width: int, seed: int, sees: Sees
    ) -> None:
        super().__init__(spec, sees)
        self.width = width
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("vectors", torch.randn(self.vocabulary, width, generator=generator))

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> RandomTextTeacher:
        """Width from `random_width`, what is seen from `sees`."""
        return cls(spec, patch_size, width=config.random_width, seed=seed, sees=config.sees)

    @property
    def settings(self) -> dict[str, Any]:
        """Width, seed and what is seen."""
        return {"width": self.width, "seed": self.seed, "sees": self._sees}

    @property
    def feature_width(self) -> int:
        """D."""
        return self.width

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, V, D) float32."""
        ids, present = self.tokens(x)
        vectors = self.vectors[ids] * present[:, :, None]
        order = torch.arange(x.shape[1], device=x.device)
        distance = (order[:, None] - order).to(vectors)
        weights = DECAY ** distance.abs()
        if self._sees != "both":
            weights = weights.tril() if self._sees == "prefix" else weights.triu()
        return torch.einsum("ts,bsd->btd", weights, vectors) * present[:, :, None]
