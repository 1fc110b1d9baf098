"""The automaton of texts in which keywords appear (A. V. Aho and M. J. Corasick, "Efficient string
matching: an aid to bibliographic search", CACM 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from distpc.errors import ConstraintError
from distpc.inference.automaton import Automaton

Ways = Sequence[Sequence[Sequence[int]]]
"""For every keyword its token sequences."""

State = tuple[int, int]
"""Node of the trie, and a bit for every keyword that has appeared."""

_DONE, _FAILED = (-1, 0), (-2, 0)
"""All keywords have appeared; the text has ended without."""


def keywords(
    ways: Ways, vocabulary: int, *, end_token: int | None = None, names: Sequence[str] = ()
) -> Automaton:
    """The automaton of texts in which every keyword appears, in any order.

    A keyword appears where any of its token sequences does (a word has several: with and without a
    space in front). What comes behind the token that ends a document does not count. States are
    nodes of the trie of all sequences times the keywords that have appeared; two more are for texts
    that have all of them, or have ended without.

    Args:
        ways: for every keyword its token sequences.
        vocabulary: C.
        end_token: the token that ends a document.
        names: of the keywords, for errors.

    Raises:
        ConstraintError: no keyword, one without tokens, or a token outside the vocabulary.
    """
    _check(ways, vocabulary, end_token, names)
    trie = _Trie(ways)
    letters = sorted({token for node in trie.children for token in node})
    special = [*letters, *([] if end_token is None else [end_token])]
    classes = np.zeros(vocabulary, dtype=np.int64)
    classes[special] = np.arange(1, len(special) + 1)
    rows = _explore(trie, letters, len(ways), end_token is not None)
    numbers = {state: number for number, state in enumerate(rows)}
    table = np.array([[numbers[after] for after in row] for row in rows.values()], dtype=np.int64)
    accepting = np.array([state == _DONE for state in rows])
    name = f"keywords {', '.join(map(repr, names))}" if names else f"{len(ways)} keywords"
    return Automaton(classes, table, accepting, name)


def _check(ways: Ways, vocabulary: int, end_token: int | None, names: Sequence[str]) -> None:
    if not ways:
        raise ConstraintError("a constraint has no keywords", expected="at least one")
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


def _explore(
    trie: _Trie, letters: Sequence[int], num_keywords: int, has_end: bool
) -> dict[State, list[State]]:
    """The reachable states, the first one first, and what follows each: after any other token,
    after every letter, and after the end."""
    full = (1 << num_keywords) - 1
    width = 1 + len(letters) + has_end
    rows: dict[State, list[State]] = {}
    queue: deque[State] = deque([(0, 0)])
    while queue:
        state = queue.popleft()
        if state in rows:
            continue
        if state in (_DONE, _FAILED):
            rows[state] = [state] * width
            continue
        node, have = state
        rows[state] = [(0, have)]
        for letter in letters:
            after = trie.step(node, letter)
            has = have | trie.found[after]
            rows[state].append(_DONE if has == full else (after, has))
        rows[state] += [_FAILED] * has_end
        queue += rows[state]
    return rows


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
