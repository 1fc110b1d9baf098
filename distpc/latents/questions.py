"""How a clustering asks whoever holds the shards, and adds up what stays with them.

Questions are methods of `FeatureHolder`. Answers come in the order of items. A question with two
answers leaves the second, large one behind, under a handle; pairs of those are added in a tree, so
that the driver sees one result in place of one from every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from distpc.errors import HeldLostError
from distpc.latents.entries import Entries
from distpc.latents.holder import Draw, View

Ask = Callable[[str, Sequence[Any]], list[Any]]
Hold = Callable[[str, Sequence[Any]], list[tuple[Any, Any]]]

_MOST_LOSSES = 5
"""Times that one question is asked again after a machine took what it held with it."""


@dataclass(frozen=True)
class Holders:
    """Whoever holds the shards.

    Attributes:
        ask: puts a question, an item each.
        hold: the same, where the second answer stays behind a handle.
        put: makes a value cheap to send with many items (Ray's object store).
        num_groups: of neighbouring shards that are asked about at once: the same ones for every
            question, so that they stay with who has them in memory.
    """

    ask: Ask
    hold: Hold
    put: Callable[[Any], Any] = lambda value: value
    num_groups: int = 2

    def each(self, question: str, items: Sequence[Any]) -> list[Any]:
        """Ask about every shard, an item each."""
        groups = [(question, group) for group in self._groups(items)]
        return [answer for answers in self.ask("each", groups) for answer in answers]

    def sum(
        self, question: str, items: Sequence[Any], finish: str = "show", *rest: Any
    ) -> tuple[list[Any], Any]:
        """Ask about every shard, with two answers: the first ones, and `finish` of the sum of the
        second ones, which may be added in any order.

        When the machine that held a part is lost, everything is asked again.

        Args:
            finish: question about the sum, with `rest` after it in its item.
        """
        groups = [(question, group) for group in self._groups(items)]
        notes, total = self.sum_in_order("sum_each", groups, finish, *rest)
        return [note for group in notes for note in group], total

    def sum_in_order(
        self, question: str, items: Sequence[Any], finish: str = "show", *rest: Any
    ) -> tuple[list[Any], Any]:
        """As `sum`, one by one and in pairs of neighbours: the same order for any groups."""
        for attempt in range(_MOST_LOSSES + 1):
            try:
                noted = self.hold(question, items)
                parts = [part for _, part in noted]
                while len(parts) > 1:
                    pairs = list(zip(parts[::2], parts[1::2], strict=False))
                    left = parts[2 * len(pairs) :]
                    parts = [part for _, part in self.hold("add", pairs)] + left
                item = (parts[0], *rest) if rest else parts[0]
                return [note for note, _ in noted], self.ask(finish, [item])[0]
            except HeldLostError:
                if attempt == _MOST_LOSSES:
                    raise
        raise AssertionError("not reached")

    def _groups(self, items: Sequence[Any]) -> list[list[Any]]:
        """Neighbours, in groups of about one size."""
        count = min(self.num_groups, len(items))
        ends = [len(items) * group // count for group in range(count + 1)]
        return [list(items[a:b]) for a, b in pairwise(ends)]

    def take(self, sources: Sequence[Draw | View], entries: Entries) -> np.ndarray:
        """(n, D) float32 points of n > 0 entries of `sources`, in the order of entries."""
        places = [np.flatnonzero(entries.shards == shard) for shard in range(len(sources))]
        items = [
            (source, entries.rows[place]) for source, place in zip(sources, places, strict=True)
        ]
        found = [points for points in self.each("take", items) if points is not None]
        order = np.argsort(np.concatenate(places), kind="stable")
        points: np.ndarray = np.concatenate(found)[order]
        return points


def shard_of(question: str, item: Any) -> str | None:
    """The shard that a question is about, the first one of a group; None when it is about none."""
    if question in ("each", "sum_each"):
        return shard_of(item[0], item[1][0])
    if question in ("add", "show", "means"):
        return None
    # A name, a view, a draw of one, or a tuple that begins with one of them.
    while not isinstance(item, str):
        item = item[0]
    return item
