"""Which state of a language model stands for a token: the one behind it, or the one that made it.

The feature of a token is what a model knows once it has read the token. What it knew *before*, when
it gave the token its probability, is the feature of the token in front ("producing"); both side by
side say where the text was and where it goes.
Shapes: B batch, V tokens of a chunk, D feature width of the inner teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.base import Teacher
from distpc.teachers.wrapped import WrappedTeacher

ALIGNMENTS = ("producing", "both")


class AlignedTeacher(WrappedTeacher):
    """Another teacher of text, its features moved by one token, or doubled.

    Args:
        spec: the data set.
        patch_size: without meaning for text.
        inner_kind, inner_settings: of the other teacher.
        state: `producing` or `both`.
    """

    kind = "aligned"
    made_by = "teacher.state to producing or both"

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        inner_kind: str,
        inner_settings: dict[str, Any],
        state: str,
    ) -> None:
        super().__init__(spec, patch_size, inner_kind=inner_kind, inner_settings=inner_settings)
        self.state = state

    @classmethod
    def wrap(cls, inner: Teacher, state: str) -> AlignedTeacher:
        """Move the features of `inner`, a finished teacher.

        Raises:
            TeacherError: it reads no text.
        """
        if inner.spec.kind != "text":
            raise TeacherError(
                "only tokens have states in front of them",
                where="teacher.state",
                found=f"{state}, and {inner.spec.kind} data",
                expected="token",
            )
        return cls.around(inner, state=state)

    @property
    def settings(self) -> dict[str, Any]:
        """The inner teacher's kind and settings, and the state."""
        return {**super().settings, "state": self.state}

    @property
    def name(self) -> str:
        """Names the inner teacher too."""
        return f"aligned {self.inner.name}, {self.state}"

    @property
    def feature_width(self) -> int:
        """D, or 2 D for both."""
        return self.inner.feature_width * (2 if self.state == "both" else 1)

    @property
    def sees(self) -> str:
        """Of the token in front, or of both."""
        own = f", and {self.inner.sees}" if self.state == "both" else ""
        return f"of the token in front: {self.inner.sees}{own}"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, V, D) or (B, V, 2 D) float32; zeros in front of the first."""
        own = self.inner.encode(x)
        before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
        before = before * (x.to(before.device) >= 0)[:, :, None]
        return before if self.state == "producing" else torch.cat([before, own], dim=2)
