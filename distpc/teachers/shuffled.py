"""The control `shuffled`: another teacher's features, each sample given those of another sample.

Everything about the features is kept but their bond with the sample: what a circuit gains from
these latents it does not owe to what the teacher knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.base import Teacher
from distpc.teachers.wrapped import WrappedTeacher

_LARGEST = 2**63 - 1


class ShuffledTeacher(WrappedTeacher):
    """Encodes, in place of a sample, one of M kept samples that a hash of the sample picks.

    Picking is with replacement, so that a sample's features are a function of it alone, whatever
    batch or worker it is in; one in M is given its own.

    Args:
        spec: the data set.
        patch_size: side of a patch in pixels.
        inner_kind: kind of the teacher whose features are shuffled.
        inner_settings: its settings.
        num_samples: M.
        seed: of the hash.
    """

    kind = "shuffled"
    made_by = "teacher.shuffle_samples to true"
    bank: Tensor
    multipliers: Tensor

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        inner_kind: str,
        inner_settings: dict[str, Any],
        num_samples: int,
        seed: int,
    ) -> None:
        super().__init__(spec, patch_size, inner_kind=inner_kind, inner_settings=inner_settings)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        shape = (spec.num_variables,)
        multipliers = torch.randint(-_LARGEST, _LARGEST, shape, generator=generator)
        # Kept as weights, so that a later torch picks the same samples.
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("bank", torch.zeros(num_samples, *shape, dtype=torch.int32))

    @classmethod
    def wrap(cls, inner: Teacher, bank: Tensor, seed: int) -> ShuffledTeacher:
        """Shuffle the features of `inner`, a finished teacher, over `bank` (M, V) integers.

        Raises:
            TeacherError: there are no samples to choose from.
        """
        if not len(bank):
            raise TeacherError("features cannot be shuffled over no samples", where="train split")
        inner.check_batch(bank)
        wrapped = cls.around(inner, num_samples=len(bank), seed=seed)
        wrapped.bank.copy_(bank)
        return wrapped

    @property
    def settings(self) -> dict[str, Any]:
        """The inner teacher's kind and settings, M and the seed."""
        return {**super().settings, "num_samples": len(self.bank), "seed": self.seed}

    @property
    def name(self) -> str:
        """Names the inner teacher too."""
        return f"shuffled {self.inner.name}"

    @property
    def sees(self) -> str:
        """Another sample."""
        return f"of another sample, {self.inner.sees}"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, Z, D) float32, the inner features of other samples."""
        if not len(x):
            return self.inner.encode(x)
        # For its checks: what cannot be encoded has no right to somebody else's features either.
        self.inner.encode(x[:0])
        self._check_values(x)
        return self._of(self.bank[self._picks(x)])

    def _of(self, others: Tensor) -> Tensor:
        """Features (B, Z, D) of other samples; one with fewer tokens is gone through again."""
        found = self.inner.encode(others)
        there = self.inner.present(others)
        if there is None:
            return found
        # Missing tokens come last.
        length = there.sum(dim=1, keepdim=True).clamp(min=1)
        at = torch.arange(there.shape[1], device=length.device) % length
        at = at.to(found.device)[:, :, None].expand_as(found)
        return found.gather(1, at)

    def _check_values(self, x: Tensor) -> None:
        lowest = -1 if self.spec.has_missing else 0
        largest = torch.tensor([int(count or 0) - 1 for count in self.spec.num_categories])
        if bool((x < lowest).any()) or bool((x > largest.to(x.device)).any()):
            raise self.refuse_values(x, f"values {lowest} .. {int(largest.max())}")

    def _picks(self, x: Tensor) -> Tensor:
        """(B,) rows of the bank: a multiply-add hash modulo 2**64, of which high bits count."""
        hashed = (x.to(self.multipliers) * self.multipliers).sum(dim=1)
        return ((hashed >> 31) & 0xFFFFFFFF) % len(self.bank)
