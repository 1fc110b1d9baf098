"""Constraints on texts as deterministic finite automata over tokens.

Tokens that every state treats alike are one class, so that an automaton over a vocabulary of 50k
has a table of states x a few classes.
"""

from __future__ import annotations

from collections import deque
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


def keywords(
    ways: Sequence[Sequence[Sequence[int]]],
    vocabulary: int,
    *,
    end_token: int | None = None,
    names: Sequence[str] = (),
) -> Automaton:
    """The automaton of texts in which every keyword appears, in any order.

    A keyword appears where any of its token sequences does (a word has several: with and without a
    space in front). What comes behind the token that ends a document does not count. States are
    nodes of the trie of all sequences (Aho and Corasick 1975) times the keywords that are still to
    come; two more are for texts that have all of them, or have ended without.

    Args:
        ways: for every keyword its token sequences.
        vocabulary: C.
        end_token: the token that ends a document.
        names: of the keywords, for errors.

    Raises:
        ConstraintError: no keyword, one without tokens, or a token outside the vocabulary.
    """
    name = f"keywords {', '.join(map(repr, names))}" if names else f"{len(ways)} keywords"
    for number, sequences in enumerate(ways):
        tokens = [token for sequence in sequences for token in sequence]
        is_empty = not sequences or not all(len(sequence) for sequence in sequences)
        if is_empty or not 0 <= min(tokens) <= max(tokens) < vocabulary or end_token in tokens:
            raise ConstraintError(
                "a keyword has no tokens, or tokens that no text can hold",
                where=names[number] if names else f"keyword {number}",
                found=[list(sequence) for sequence in sequences],
                expected=f"sequences of tokens 0 .. {vocabulary - 1}",
            )
    if not ways:
        raise ConstraintError("a constraint has no keywords", expected="at least one")
    trie = _Trie(ways)
    letters = sorted({token for node in trie.children for token in node})
    special = [*letters, *([] if end_token is None else [end_token])]
    classes = np.zeros(vocabulary, dtype=np.int64)
    classes[special] = np.arange(1, len(special) + 1)
    full = (1 << len(ways)) - 1
    done, failed = -1, -2
    numbers: dict[tuple[int, int], int] = {(0, 0): 0}
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    queue = deque([(0, 0)])
    while queue:
        node, have = queue.popleft()
        row = [(0, have)]  # any other token starts over
        for letter in letters:
            after = trie.step(node, letter)
            has = have | trie.found[after]
            row.append((done, full) if has == full else (after, has))
        if end_token is not None:
            row.append((failed, 0))
        for state in row:
            if state not in numbers:
                numbers[state] = len(numbers)
                if state[0] >= 0:
                    queue.append(state)
        rows[node, have] = row
    table = np.empty((len(numbers), len(special) + 1), dtype=np.int64)
    for state, number in numbers.items():
        if state[0] < 0:
            table[number] = number
    for state, row in rows.items():
        table[numbers[state]] = [numbers[next_state] for next_state in row]
    accepting = np.zeros(len(numbers), dtype=bool)
    accepting[numbers[done, full]] = True
    return Automaton(classes, table, accepting, name)


class _Trie:
    """All sequences of all keywords, with the failure links of Aho and Corasick."""

    def __init__(self, ways: Sequence[Sequence[Sequence[int]]]) -> None:
        self.children: list[dict[int, int]] = [{}]
        self.found = [0]
        for number, sequences in enumerate(ways):
            for sequence in sequences:
                node = 0
                for token in sequence:
                    if token not in self.children[node]:
                        self.children[node][token] = len(self.children)
                        self.children.append({})
                        self.found.append(0)
                    node = self.children[node][token]
                self.found[node] |= 1 << number
        self.links = [0] * len(self.children)
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            for token, child in self.children[node].items():
                self.links[child] = self.step(self.links[node], token)
                self.found[child] |= self.found[self.links[child]]
                queue.append(child)

    def step(self, node: int, token: int) -> int:
        """The longest suffix that is a node."""
        while node and token not in self.children[node]:
            node = self.links[node]
        return self.children[node].get(token, 0)
