"""How a clustering asks whoever holds the shards, and adds up what stays with them.

Questions are methods of `FeatureHolder`. Answers come in the order of items. A question with two
answers leaves the second, large one behind, under a handle; pairs of those are added in a tree, so
that the driver sees one result in place of one from every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """

    ask: Ask
    hold: Hold
    put: Callable[[Any], Any] = lambda value: value

    def sum(
        self, question: str, items: Sequence[Any], finish: str = "show", *rest: Any
    ) -> tuple[list[Any], Any]:
        """Ask with two answers: the first ones, and `finish` of the sum of the second ones.

        Sums are made in pairs of neighbours, so the order is the same whoever does it. When the
        machine that held a part is lost, everything is asked again.

        Args:
            finish: question about the sum, with `rest` after it in its item.
        """
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

    def take(self, sources: Sequence[Draw | View], entries: Entries) -> np.ndarray:
        """(n, D) float32 points of entries of `sources`, in the order of entries."""
        named = sorted(set(entries.shards.tolist()))
        places = [np.flatnonzero(entries.shards == shard) for shard in named]
        answers = self.ask(
            "take",
            [
                (sources[shard], entries.rows[place])
                for shard, place in zip(named, places, strict=True)
            ],
        )
        order = np.argsort(np.concatenate(places), kind="stable")
        points: np.ndarray = np.concatenate(answers)[order]
        return points
