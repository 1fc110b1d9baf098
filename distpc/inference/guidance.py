"""A language model that has to meet a constraint: a hidden Markov model looks ahead for it.

    p(token | prefix, constraint)  ~  p_LM(token | prefix) * p_HMM(constraint | prefix, token)

The second factor is exact under the hidden Markov model, and 0 exactly for tokens after which the
constraint cannot be met, so that every text meets it whatever the language model likes.
Legend: B texts, T tokens so far, C tokens of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpc.circuits.chain import Chain
from distpc.data.tokenizers import Tokenizer
from distpc.errors import ConstraintError, DataError
from distpc.inference.automaton import Automaton
from distpc.inference.constraints import ConstrainedChain
from distpc.inference.keywords import keywords
from distpc.teachers.pretrained import import_transformers


class Guidance:
    """Raises logits by what they mean for a constraint; called as transformers' processors are.

    Args:
        chain: the hidden Markov model, whose tokens are the language model's.
        automaton: of the constraint, which concerns the generated tokens alone.
        prompt_length: tokens of the prompt, which the hidden Markov model reads too.
        num_tokens: that are generated; the constraint is met within them.
        skip: tokens at the beginning of the prompt that are not read, such as the one that starts
            texts.
    """

    def __init__(
        self,
        chain: Chain,
        automaton: Automaton,
        prompt_length: int,
        num_tokens: int,
        skip: int = 0,
    ) -> None:
        self.constrained = ConstrainedChain(chain, automaton)
        self.prompt_length, self.num_tokens, self.skip = prompt_length, num_tokens, skip
        self._read: Tensor | None = None
        self._states = self._at = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) prompt and what was generated, (B, C) logits -> (B, C) logits.

        Raises:
            ConstraintError: the constraint cannot be met in the tokens that are left.
        """
        remaining = self.num_tokens - (input_ids.shape[1] - self.prompt_length)
        self._follow(input_ids)
        device = self.constrained.table.device
        states, at = self._states, self._at
        ratio = self.constrained.log_ratio(states, at, remaining)
        self.constrained.require(ratio.isfinite().any(-1), at, remaining)
        found = torch.full_like(scores, -torch.inf)
        size = min(scores.shape[1], ratio.shape[1])
        found[:, :size] = (scores[:, :size].to(device) + ratio[:, :size]).to(scores)
        return found

    def _follow(self, input_ids: Tensor) -> None:
        """Bring the states to the end of the texts: by one token where that is all that is new."""
        old = self._read
        if old is not None and input_ids.shape[1] == old.shape[1] + 1:
            # Beams may have been reordered: each text finds its own beginning among the old ones.
            same = (input_ids[:, None, :-1] == old[None]).all(-1)
            if bool(same.any(1).all()):
                parent = same.int().argmax(1)
                tokens = input_ids[:, -1].to(self._at.device)
                self._states, self._at = self.constrained.advance(
                    self._states[parent], self._at[parent], tokens
                )
                self._read = input_ids
                return
        chain, automaton = self.constrained.chain, self.constrained.automaton
        self._states = chain.read(input_ids[:, self.skip :]).states
        rows = input_ids[:, self.prompt_length :].tolist()
        self._at = torch.tensor([automaton.run(row) for row in rows], device=chain.start.device)
        self._read = input_ids


def logits_processor(guidance: Guidance) -> Any:
    """The guidance as a `transformers.LogitsProcessor`, for `model.generate`."""
    base = import_transformers().LogitsProcessor

    class GuidanceProcessor(base):  # type: ignore[misc, valid-type]
        """Calls the guidance."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            """Raise the logits."""
            return guidance(input_ids, scores)

    return GuidanceProcessor()


def word_constraint(
    words: Sequence[str], tokenizer: Tokenizer, vocabulary: int, end_token: int | None
) -> Automaton:
    """The constraint that every word appears, in lower case as given or capitalised.

    A word is found where the text holds its tokens, with or without a space in front: inside a
    longer word, too, if that begins or ends with the same tokens.

    Raises:
        ConstraintError: no words, or a word of nothing.
        DataError: a word of characters that the vocabulary lacks.
    """
    ways = []
    for word in words:
        if not word.strip():
            raise ConstraintError("a keyword is empty", where="keywords", found=repr(word))
        found = {tuple(tokenizer.encode(word).tolist())}
        for form in (" " + word, word.capitalize(), " " + word.capitalize()):
            # A vocabulary of characters may lack the capital.
            with contextlib.suppress(DataError):
                found.add(tuple(tokenizer.encode(form).tolist()))
        ways.append(sorted(found))
    return keywords(ways, vocabulary, end_token=end_token, names=list(words))
