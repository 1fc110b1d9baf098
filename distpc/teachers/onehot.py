"""The control `onehot`: a token's feature is the token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.teachers.texts import TextTeacher


class OneHotTeacher(TextTeacher):
    """Features are indicators of the token: clusters are groups of tokens, context is unseen."""

    kind = "onehot"

    def __init__(self, spec: DatasetSpec, patch_size: int) -> None:
        super().__init__(spec, "token")

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> OneHotTeacher:
        """Nothing in it is configured or random."""
        return cls(spec, patch_size)

    @property
    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    @property
    def feature_width(self) -> int:
        """D = C, values of a token."""
        return self.vocabulary

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, V, C) float32, 0 or 1."""
        ids, present = self.tokens(x)
        return one_hot(ids, self.vocabulary).float() * present[:, :, None]
