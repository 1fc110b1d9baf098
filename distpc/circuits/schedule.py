"""What a compiled circuit is: steps over folded regions, and who reads which rows of whom.

Plain data without tensors. A step evaluates the regions of one fold together and yields a message
of shape (E, B, K): E regions folded, B batch, K units. Consumers ask for rows of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BankPlan:
    """One parameter: the tables (matrices or input distributions) of one fold.

    Attributes:
        kind: "sum", or the family of inputs.
        owners: for each table, the regions that use it (more than one where they are tied).
        num_units: units of those regions (rows of a sum's matrix, columns of an input's table).
        sizes: for each table, fan-in of a sum or number of categories of an input (0 if real).
        blocks, strided: of sums, see `Region`.
    """

    kind: str
    owners: tuple[tuple[int, ...], ...]
    num_units: int
    sizes: tuple[int, ...]
    blocks: int = 1
    strided: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows that a consumer reads of one source step, in the order in which it wants them."""

    source: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Rows gathered from several sources.

    Attributes:
        pieces: one per source.
        order: permutation of the concatenated pieces, or None where it is the identity.
    """

    pieces: tuple[Piece, ...]
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Term:
    """One factor of some rows of a product: target row i takes row `rows[i]` of a piece.

    Attributes:
        piece: index of the piece.
        rows: rows of that piece.
        targets: rows of the product, as many.
        number: which factor of those rows it is, from 0.
        in_logs: whether those rows have many factors, and add logs instead of multiplying.
    """

    piece: int
    rows: tuple[int, ...]
    targets: tuple[int, ...]
    number: int
    in_logs: bool


@dataclass(frozen=True)
class InputPlan:
    """Rows that are one input region each, or products of `width` input regions of one bank."""

    regions: tuple[int, ...]
    bank: int
    bags: tuple[tuple[int, ...], ...]
    latents: tuple[int, ...]
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True)
class SumPlan:
    """Rows in the order of the bank's tables, `rows_per_table` consecutive rows for each."""

    regions: tuple[int, ...]
    bank: int
    rows_per_table: int
    rescale: bool
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class ProductPlan:
    """The first `num_log_rows` rows have many children, and add logs."""

    regions: tuple[int, ...]
    terms: tuple[Term, ...]
    num_log_rows: int
    latents: tuple[int, ...]
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class KroneckerPlan:
    """Two requests: the left and the right factor of each row."""

    regions: tuple[int, ...]
    latents: tuple[int, ...]
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class ConcatPlan:
    """One request for each group of units that is put side by side."""

    regions: tuple[int, ...]
    latents: tuple[int, ...]
    requests: tuple[Request, ...]


StepPlan = InputPlan | SumPlan | ProductPlan | KroneckerPlan | ConcatPlan


@dataclass(frozen=True)
class Fanout:
    """How a step's rows are dealt to their consumers: one permutation, then one split.

    Attributes:
        order: rows in dealing order, or None where that is 0, 1, 2, ...
        sizes: rows that each consumer gets.
        consumers: (step, request, piece) of each consumer.
    """

    order: tuple[int, ...] | None
    sizes: tuple[int, ...]
    consumers: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """A compiled region graph.

    Attributes:
        steps: in order of evaluation; the last one that is read is the root's.
        banks: parameters.
        fanouts: one per step.
        places: for each region, the (step, row) of its message; None for inputs that are only
            evaluated inside a product.
        root: (step, row) of the root.
        reads_once: whether every message enters the likelihood exactly once, as in a tree: its
            log-scale then needs no routing.
    """

    steps: tuple[StepPlan, ...]
    banks: tuple[BankPlan, ...]
    fanouts: tuple[Fanout, ...]
    places: tuple[tuple[int, int] | None, ...]
    root: tuple[int, int]
    reads_once: bool = False
