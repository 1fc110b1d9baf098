"""Transformer language models of text, trained here: causal and masked.

Tokens are what the data hold, bytes or ids. The figure is bits a token (`bpt`), for bytes bits a
byte: of all tokens given those before (or behind) them, or of hidden tokens given the others.
Shapes: B batch, V variables (tokens of a chunk), W width, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distpc.config.teachers import TeacherConfig
from distpc.data.spec import DatasetSpec
from distpc.errors import TeacherError
from distpc.teachers.patch_nets import bits
from distpc.teachers.texts import Sees, TextTeacher, windowed
from distpc.teachers.trainable import Trainable, entropy_bits, histogram, masking_ratio
from distpc.teachers.transformer import Block

_MAX_TOKENS = 16384
"""Tokens that are put through a masked model at once during encoding."""


class _LanguageModel(TextTeacher, Trainable):
    """Token and position vectors, blocks, and logits of tokens."""

    figure = "bpt"

    def __init__(
        self,
        spec: DatasetSpec,
        patch_size: int,
        *,
        width: int,
        num_heads: int,
        num_blocks: int,
        sees: Sees,
    ) -> None:
        super().__init__(spec, sees)
        self._settings = {
            "width": width,
            "num_heads": num_heads,
            "num_blocks": num_blocks,
            "sees": sees,
        }
        causal = self.kind == "causal_lm"
        # One more than the tokens: what a causal model starts from, a masked one hides with.
        self.embed = nn.Embedding(self.vocabulary + 1, width)
        self.positions = nn.Parameter(torch.randn(spec.num_variables + 1, width) * 0.1)
        self.blocks = nn.ModuleList(
            [Block(width, num_heads, causal=causal) for _ in range(num_blocks)]
        )
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, self.vocabulary)

    @classmethod
    def from_config(
        cls, config: TeacherConfig, spec: DatasetSpec, patch_size: int, seed: int
    ) -> _LanguageModel:
        """Sizes from the kind's section, and `teacher.sees`; `seed` draws the initial weights."""
        sizes: Any = getattr(config, cls.kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(
                spec,
                patch_size,
                width=sizes.width,
                num_heads=sizes.num_heads,
                num_blocks=sizes.num_blocks,
                sees=config.sees,
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Sizes of the network, and the side that it sees."""
        return dict(self._settings)

    @property
    def feature_width(self) -> int:
        """D = W."""
        return self.embed.embedding_dim

    def statistics(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """How often each token occurs."""
        return histogram(x, self.vocabulary)

    def baseline(self, sums: Tensor) -> float:
        """Bits of a token under the best distribution that is the same everywhere."""
        return entropy_bits(sums)

    def states(self, ids: Tensor, present: Tensor | None = None) -> Tensor:
        """ids (N, L) with C for the extra token, present (N, L) bool -> (N, L, W)."""
        tokens = self.embed(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, None, present)
        normal: Tensor = self.norm(tokens)
        return normal

    def _measured(self, states: Tensor, ids: Tensor, counted: Tensor, share: Tensor) -> Tensor:
        """Bits of tokens ids (B, V) where counted (B, V); `share` (B,) scales the loss."""
        logits = self.to_logits(states).transpose(1, 2)
        spent = bits(cross_entropy(logits, ids, reduction="none")) * counted
        total, weight = spent.sum(dim=1), counted.sum(dim=1).to(spent.dtype)
        return torch.stack([total / share, total, weight], dim=1)


class CausalLanguageModel(_LanguageModel):
    """Reads forwards where `sees` is prefix, and from the end backwards where it is suffix.

    The feature of a token is the state that predicts the next one.

    Raises:
        TeacherError: `sees` is both.
    """

    kind = "causal_lm"

    def __init__(self, spec: DatasetSpec, patch_size: int, *, sees: Sees, **sizes: int) -> None:
        if sees not in ("prefix", "suffix"):
            raise TeacherError(
                "a causal language model does not see both sides",
                where="teacher.sees",
                found=sees,
                expected="prefix or suffix",
                fix="set teacher.sees",
            )
        super().__init__(spec, patch_size, sees=sees, **sizes)

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """Nothing is random."""
        return ()

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V) -> (B, 3): mean bits over the V places, bits and number of present tokens."""
        ids, present = self.tokens(x)
        order = self._order(present)
        ids, present = ids.gather(1, order), present.gather(1, order)
        share = torch.full((len(x),), float(x.shape[1]), device=ids.device)
        return self._measured(self._run(ids)[:, :-1], ids, present, share)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, V, W) float32."""
        ids, present = (part.to(self.positions.device) for part in self.tokens(x))
        order = self._order(present)
        found = self._run(ids.gather(1, order))[:, 1:]
        back = order.argsort(dim=1)[:, :, None].expand(-1, -1, found.shape[2])
        return found.gather(1, back) * present[:, :, None]

    def _order(self, present: Tensor) -> Tensor:
        """(B, V) places in reading order; what is missing comes last."""
        place = torch.arange(present.shape[1], device=present.device).expand_as(present)
        if self._sees == "prefix":
            return place
        return (present.sum(dim=1, keepdim=True) - 1 - place) % present.shape[1]

    def _run(self, ids: Tensor) -> Tensor:
        start = torch.full_like(ids[:, :1], self.vocabulary)
        return self.states(torch.cat([start, ids], dim=1))


class MaskedLanguageModel(_LanguageModel):
    """Sees all tokens; a side is hidden by showing it every prefix or suffix by itself.

    The feature of a token is its state with nothing hidden.
    """

    kind = "masked_lm"

    def draw(
        self, num_samples: int, generator: torch.Generator, section: Any, training: bool
    ) -> tuple[Tensor, ...]:
        """(B, V) bool: tokens that are hidden, about the same share of each chunk."""
        ratio = masking_ratio(generator, section, training)
        scores = torch.rand(num_samples, self.spec.num_variables, generator=generator)
        # The first of a chunk's hidden tokens is there in every batch: no loss is empty.
        return (scores <= scores.min(dim=1, keepdim=True).values.clamp(min=ratio),)

    def forward(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """x (B, V), hidden (B, V) -> (B, 3): mean bits of hidden tokens, their bits, number."""
        ids, present = self.tokens(x)
        hidden = drawn[0] & present
        shown = torch.where(hidden, self.vocabulary, ids)
        share = hidden.sum(dim=1).clamp(min=1)
        return self._measured(self.states(shown, present), ids, hidden, share)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, V) integers -> (B, V, W) float32."""
        ids, present = (part.to(self.positions.device) for part in self.tokens(x))
        if not present.any():
            return torch.zeros(*x.shape, self.feature_width, device=ids.device)
        return windowed(self.states, ids, present, self._sees, False, _MAX_TOKENS)
