"""Which rows a step reads of which earlier steps, and how a step's rows are dealt out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from distpc.circuits.schedule import Fanout, Piece, ProductPlan, Request, StepPlan, Term

DIRECT_CHILDREN = 4
"""Products of more children add logs: multiplied, they lose mass silently."""

Places = Sequence[tuple[int, int] | None]


class Order:
    """Where each region is first read, counted from the root: rows are sorted by it."""

    def __init__(self, num_regions: int) -> None:
        self._keys: list[tuple[int, int, int]] = [(0, 0, 0)] * num_regions
        self._seen = [False] * num_regions
        self._folds = 0

    def key(self, region: int) -> tuple[int, int, int]:
        """(fold from the root, child number, row) of the region's first reader."""
        return self._keys[region]

    def place(self, rows: Sequence[int], children: Callable[[int], Sequence[int]]) -> None:
        """Record the children of a fold's rows, in the order in which they are read."""
        self._folds += 1
        for row, region in enumerate(rows):
            for number, child in enumerate(children(region)):
                if not self._seen[child]:
                    self._seen[child] = True
                    self._keys[child] = (self._folds, number, row)


def gather(regions: Sequence[int], places: Places) -> Request:
    """The request for the messages of `regions`, in this order (repeats allowed)."""
    rows: dict[int, list[int]] = defaultdict(list)
    positions: dict[int, list[int]] = defaultdict(list)
    for position, region in enumerate(regions):
        step, row = _place(region, places)
        rows[step].append(row)
        positions[step].append(position)
    pieces = tuple(Piece(step, tuple(rows[step])) for step in rows)
    dealt = [position for step in rows for position in positions[step]]
    order = [0] * len(dealt)
    for index, position in enumerate(dealt):
        order[position] = index
    return Request(pieces, None if order == sorted(order) else tuple(order))


def concat_requests(children: Sequence[Sequence[int]], places: Places) -> tuple[Request, ...]:
    """One request per group of units."""
    return tuple(gather(group, places) for group in zip(*children, strict=True))


def product_terms(
    children: Sequence[Sequence[int]], places: Places
) -> tuple[Request, tuple[Term, ...], int]:
    """The request, the factors and the number of rows in logs of a product step.

    Args:
        children: for each row its children; rows with many of them (that add logs) first.
        places: (step, row) of every region.
    """
    used: dict[int, set[int]] = defaultdict(set)
    for row_children in children:
        for child in row_children:
            step, row = _place(child, places)
            used[step].add(row)
    pieces = tuple(Piece(step, tuple(sorted(rows))) for step, rows in used.items())
    local = {
        (piece.source, row): (number, index)
        for number, piece in enumerate(pieces)
        for index, row in enumerate(piece.rows)
    }
    num_log_rows = sum(len(row_children) > DIRECT_CHILDREN for row_children in children)
    terms = []
    for number in range(max(map(len, children))):
        factors: dict[tuple[bool, int], tuple[list[int], list[int]]] = {}
        for target, row_children in enumerate(children):
            if number >= len(row_children):
                continue
            piece, row = local[_place(row_children[number], places)]
            rows, targets = factors.setdefault((target < num_log_rows, piece), ([], []))
            rows.append(row)
            targets.append(target)
        terms += [
            Term(piece, tuple(rows), tuple(targets), number, in_logs)
            for (in_logs, piece), (rows, targets) in factors.items()
        ]
    return Request(pieces), tuple(terms), num_log_rows


def deal(steps: Sequence[StepPlan]) -> tuple[Fanout, ...]:
    """For every step, how its rows reach their consumers."""
    readers: dict[int, list[tuple[tuple[int, ...], tuple[int, int, int]]]] = defaultdict(list)
    for number, step in enumerate(steps):
        for request_number, request in enumerate(step.requests):
            for piece_number, piece in enumerate(request.pieces):
                consumer = (number, request_number, piece_number)
                readers[piece.source].append((piece.rows, consumer))
    fanouts = []
    for number, step in enumerate(steps):
        dealt = sorted(readers[number], key=lambda reader: (min(reader[0]), reader[1]))
        order = tuple(row for rows, _ in dealt for row in rows)
        is_identity = order == tuple(range(len(step.regions)))
        fanouts.append(
            Fanout(
                order=None if is_identity else order,
                sizes=tuple(len(rows) for rows, _ in dealt),
                consumers=tuple(consumer for _, consumer in dealt),
            )
        )
    return tuple(fanouts)


def uses_each_row_once(plan: ProductPlan, piece: int) -> bool:
    """Whether no two factors of a product step read the same row of a piece."""
    rows = [row for term in plan.terms if term.piece == piece for row in term.rows]
    return len(rows) == len(set(rows))


def _place(region: int, places: Places) -> tuple[int, int]:
    place = places[region]
    if place is None:
        raise ValueError(f"region {region} has no message of its own")
    return place
