"""Sums that stay with workers: the tree, and machines that take a part of it with them."""

from __future__ import annotations

import numpy as np
import pytest

from distpc.errors import HeldLostError
from distpc.latents.entries import Entries
from distpc.latents.holder import Draw, View
from distpc.latents.questions import Holders, shard_of


class Workers:
    """Hold numbers and add them up; some calls lose what was held."""

    def __init__(self, lost: set[int]) -> None:
        self.lost = lost
        self.calls: list[tuple[str, list]] = []

    def hold(self, method, items):
        self.note(method, items)
        if method == "sum_each":
            return [(group, list(group)) for _, group in items]
        if method == "add":
            return [(None, first + second) for first, second in items]
        return [(item, [item]) for item in items]

    def ask(self, method, items):
        self.note(method, items)
        return items

    def note(self, method, items):
        self.calls.append((method, list(items)))
        if len(self.calls) in self.lost:
            raise HeldLostError("lost")


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_parts_are_added_in_their_order(count):
    workers = Workers(set())
    notes, total = Holders(workers.ask, workers.hold).sum_in_order("parts", list(range(count)))
    assert notes == total == list(range(count))
    assert sum(method == "add" for method, _ in workers.calls) == int(np.ceil(np.log2(count)))


@pytest.mark.parametrize("lost", [{1}, {2}, {5}, {2, 4, 7}])
def test_what_a_machine_took_with_it_is_made_again(lost):
    workers = Workers(lost)
    notes, total = Holders(workers.ask, workers.hold).sum_in_order("parts", [3, 1, 4, 1, 5], "show")
    assert notes == total == [3, 1, 4, 1, 5]
    assert sum(method == "parts" for method, _ in workers.calls) == 1 + len(lost)


def test_losses_without_end_are_told():
    workers = Workers(set(range(100)))
    with pytest.raises(HeldLostError):
        Holders(workers.ask, workers.hold).sum_in_order("parts", [1, 2])
    assert len(workers.calls) < 10


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_groups_are_of_neighbours(groups):
    workers = Workers(set())
    holders = Holders(workers.ask, workers.hold, num_groups=groups)
    notes, total = holders.sum("parts", list(range(7)))
    assert notes == total == list(range(7))
    (method, asked), *_ = workers.calls
    assert method == "sum_each"
    assert len(asked) == min(groups, 7)
    assert max(len(group) for _, group in asked) - min(len(group) for _, group in asked) <= 1


def test_points_come_in_the_order_of_entries():
    shards = [np.arange(5.0)[:, None], np.arange(10.0, 13)[:, None]]

    def ask(method, items):
        assert method == "each"
        assert all(question == "take" for question, _ in items)
        return [
            [shards[int(view.shard)][rows] if len(rows) else None for view, rows in group]
            for _, group in items
        ]

    views = [View("0"), View("1"), View("0")]
    entries = Entries.at(np.array([6, 0, 5, 10, 4]), [5, 3, 5])
    assert entries.shards.tolist() == [1, 0, 1, 2, 0]
    points = Holders(ask, ask).take(views, entries)
    assert points.ravel().tolist() == [11.0, 0.0, 10.0, 2.0, 4.0]


def test_questions_name_the_shard_that_they_are_about():
    draw = Draw(View("b", 3), 10, (0, 1))
    groups = [("draw", [draw, Draw(View("c"), 1, (0,))]), ("describe", ["b", "c"])]
    assert [shard_of("each", group) for group in groups] == ["b", "b"]
    assert shard_of("sum_each", ("totals", [(draw, np.zeros(2), 24)])) == "b"
    assert shard_of("moments", "b") == "b"
    # Sums are with nobody in particular.
    assert shard_of("add", ("one", "other")) is None
    assert shard_of("means", ("sum", np.zeros(2))) is None
