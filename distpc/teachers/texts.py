"""Teachers of text: every latent is a token (a byte, or an id of a tokenizer).

Shapes: B batch, V variables (tokens of a chunk), Z = V latents, D feature width, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distpc.data.spec import MISSING, DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.base import Teacher

Sees = Literal["token", "prefix", "suffix", "both"]
IN_WORDS = {
    "token": "its token",
    "prefix": "its token and those before it",
    "suffix": "its token and those behind it",
    "both": "all tokens",
}


@dataclass(frozen=True)
class TokenLine:
    """The latents of a chunk: one a token, in a row.

    Attributes:
        columns: tokens in a chunk.
    """

    columns: int

    @property
    def rows(self) -> int:
        """One."""
        return 1

    @property
    def size(self) -> int:
        """One: a token."""
        return 1


class TextTeacher(Teacher):
    """Maps every token of a chunk to a feature vector; that of a missing token is zero.

    Args:
        spec: the data set that it reads: chunks of tokens.
        sees: what the feature of a token depends on.

    Raises:
        TeacherError: the data are no text.
    """

    def __init__(self, spec: DatasetSpec, sees: Sees) -> None:
        super().__init__(spec, TokenLine(spec.num_variables))
        sizes = set(spec.num_categories)
        if spec.kind != "text" or len(sizes) != 1 or None in sizes:
            raise TeacherError(
                f"teacher {self.kind} reads text",
                where="teacher.kind",
                found=f"data set {spec.name} of kind {spec.kind}",
                expected="chunks of tokens with one vocabulary",
                fix="choose another teacher.kind, or data of kind text",
            )
        self._sees = sees

    @property
    def vocabulary(self) -> int:
        """C, values of a token."""
        return int(self.spec.num_categories[0] or 0)

    @property
    def sees(self) -> str:
        """What the feature of a token depends on."""
        return IN_WORDS[self._sees]

    def present(self, x: Tensor) -> Tensor | None:
        """(B, V) bool, the tokens that are not missing; None where none is."""
        there = x != MISSING
        return None if bool(there.all()) else there

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, V) integers -> ids (B, V) int64 with 0 for what is missing, present (B, V) bool.

        Raises:
            TeacherError: wrong width or type, or a value that is no token.
        """
        self.check_batch(x)
        largest = self.vocabulary - 1
        lowest = MISSING if self.spec.has_missing else 0
        if x.numel() and not lowest <= int(x.min()) <= int(x.max()) <= largest:
            raise self.refuse_values(x, f"values {lowest} .. {largest}")
        present = x != MISSING
        return x.long() * present, present


def windowed(
    states: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    present: Tensor,
    sees: Sees,
    causal: bool,
    max_tokens: int,
) -> Tensor:
    """Hidden states of every token, shown no more than `sees`.

    A model that looks both ways is shown each prefix or suffix by itself, V sequences a chunk; a
    causal one needs that for suffixes only, where the state of the last token is taken.

    Args:
        states: (ids (N, V), visible (N, V) bool) -> (N, V, W) hidden states.
        ids: (B, V) int64.
        present: (B, V) bool, at the front of each row.
        sees: prefix, suffix or both.
        causal: whether a state of the model depends on tokens up to its own only.
        max_tokens: tokens that are put through the model at once.

    Returns:
        (B, V, W) float32, zero for missing tokens.
    """
    num_rows, length = ids.shape
    per_call = max(1, max_tokens // length)
    if sees == "both" or (causal and sees == "prefix"):
        parts = [
            states(i, p) for i, p in zip(ids.split(per_call), present.split(per_call), strict=True)
        ]
        return torch.cat(parts).float() * present[:, :, None]
    # Rows of missing tokens would be shown nothing: only sequences of present ones are run.
    row, place = present.nonzero(as_tuple=True)
    found = None
    for row_part, part in zip(row.split(per_call), place.split(per_call), strict=True):
        order = torch.arange(length, device=ids.device)
        seen = order <= part[:, None] if sees == "prefix" else order >= part[:, None]
        seen = seen & present[row_part]
        hidden = states(ids[row_part], seen)
        taken = present[row_part].sum(dim=1) - 1 if causal else part
        chosen = hidden[torch.arange(len(part), device=ids.device), taken].float()
        if found is None:
            found = chosen.new_zeros(num_rows, length, chosen.shape[1])
        found[row_part, part] = chosen
    assert found is not None
    return found
