"""Constraints on texts as deterministic finite automata over tokens.

Tokens that every state treats alike are one class, so that an automaton over a vocabulary of 50k
has a table of states x a few classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distpc.errors import ConstraintError

UNREACHABLE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Automaton:
    """States 0 .. Q - 1, of which 0 comes first.

    Attributes:
        classes: (C,) class of every token.
        table: (Q, number of classes) the next state.
        accepting: (Q,) bool: a text that ends there meets the constraint.
        name: what is asked for, in errors.
    """

    classes: np.ndarray
    table: np.ndarray
    accepting: np.ndarray
    name: str = "the constraint"

    @classmethod
    def of_table(
        cls, table: np.ndarray, accepting: np.ndarray, name: str = "the constraint"
    ) -> Automaton:
        """From a whole table (Q, C) of next states.

        Raises:
            ConstraintError: it names states that it does not have.
        """
        table, accepting = np.asarray(table), np.asarray(accepting, dtype=bool)
        fits = table.ndim == 2 and table.size and accepting.shape == (len(table),)
        if not fits or table.min() < 0 or table.max() >= len(table):
            raise ConstraintError(
                "an automaton's table does not describe one",
                found=f"a table of shape {table.shape}, {accepting.shape} accepting states",
                expected="a table (states, tokens) of states, and which of the states accept",
            )
        columns, classes = np.unique(table, axis=1, return_inverse=True)
        return cls(classes.reshape(-1), columns.astype(np.int64), accepting, name)

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.table)

    def run(self, tokens: Sequence[int] | np.ndarray, state: int = 0) -> int:
        """The state after some tokens; missing ones (-1) are refused.

        Raises:
            ConstraintError: a token that is not in the vocabulary.
        """
        for token in tokens:
            if not 0 <= token < len(self.classes):
                raise ConstraintError(
                    "a constraint cannot follow a token outside the vocabulary",
                    found=int(token),
                    expected=f"0 .. {len(self.classes) - 1}",
                )
            state = int(self.table[state, self.classes[token]])
        return state

    def fewest_tokens(self) -> np.ndarray:
        """(Q,) tokens that each state needs at least until it accepts; UNREACHABLE: never."""
        found = np.where(self.accepting, 0, UNREACHABLE)
        for distance in range(1, self.num_states + 1):
            # A state's best neighbour is one token nearer.
            near = (found[self.table] == distance - 1).any(axis=1) & (found == UNREACHABLE)
            if not near.any():
                break
            found[near] = distance
        return found
