"""Which units of which layer live on which rank of the node axis: a table, plain data.

Ranks of the node axis see the same samples. Each owns whole rows of every sum (and columns of every
input's tables), `K / R` consecutive units, and evaluates those alone: inputs, products and sums of
one width share one slice of states, so that products need no communication. What a dense sum reads
is gathered (see `unit_exchange`); block-diagonal sums of consecutive blocks read their own slice.

What cannot be cut evenly stays whole on every rank, computed alike everywhere, and the table says
why. `share_out` applies a table to a circuit.

Legend: K units, R ranks of the node axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from distpc.circuits.blocks import Blocks
from distpc.circuits.schedule import BankPlan, InputPlan, ProductPlan, Schedule, SumPlan
from distpc.errors import ConfigError
from distpc.parallel.places import Split

UNIT_DIM = {"sum": 1, "categorical": 1, "gaussian": 2, "binomial": 2, "logistic": 2}
"""The dimension of a bank's statistics that counts its units."""


class Reading(Enum):
    """How a step reads a message, see `unit_exchange`."""

    AS_IS = "as it is"
    GATHER = "gather"
    GATHER_SHARED = "gather, shared"
    CUT = "cut"
    SHARE = "share"


@dataclass(frozen=True)
class BankLine:
    """What becomes of one bank.

    Attributes:
        name: of the bank in the circuit.
        num_units: K.
        split: of its statistics; None: whole on every rank.
        blocks: of the part that a rank keeps, for sums.
        why: it stays whole; empty where it is split.
    """

    name: str
    num_units: int
    split: Split | None
    blocks: Blocks
    why: str = ""

    def units(self, rank: int) -> range:
        """Those that live on a rank."""
        if self.split is None:
            return range(self.num_units)
        size = self.num_units // self.split.parts
        return range(rank * size, (rank + 1) * size)


@dataclass(frozen=True)
class NodeTable:
    """Who owns and who reads what.

    Attributes:
        num_ranks: R.
        banks: one line each.
        is_split: for each step, whether a rank evaluates its own units only.
        readings: by (step, request, piece).
    """

    num_ranks: int
    banks: tuple[BankLine, ...]
    is_split: tuple[bool, ...]
    readings: dict[tuple[int, int, int], Reading]

    def lines(self) -> list[str]:
        """The table as text: what lives where, and what stays whole why."""
        of_ranks = []
        for line in self.banks:
            owned = [line.units(rank) for rank in range(self.num_ranks if line.split else 1)]
            text = ", ".join(f"{units.start}:{units.stop}" for units in owned)
            of_ranks.append(f"{line.name}: units {text}" + (line.why and f" ({line.why})"))
        return of_ranks


def node_table(schedule: Schedule, num_ranks: int) -> NodeTable:
    """The table of a compiled circuit for a node axis of R ranks."""
    banks = tuple(_bank_line(n, plan, num_ranks) for n, plan in enumerate(schedule.banks))
    is_split: list[bool] = []
    for plan in schedule.steps:
        if isinstance(plan, InputPlan | SumPlan):
            is_split.append(banks[plan.bank].split is not None)
            continue
        sources = [piece.source for request in plan.requests for piece in request.pieces]
        # A slice of point masses is mostly zeros, which scaled values do not like.
        is_split.append(
            isinstance(plan, ProductPlan)
            and any(is_split[source] for source in sources)
            and not any(_is_indicator(schedule, source) for source in sources)
        )
    passes_shares = _passing_shares(schedule, is_split)
    readings = {
        (number, request, piece): _reading(
            is_split[source.source],
            reads_slice=_reads_slice(schedule, is_split, number),
            passes_shares=passes_shares[number],
            flow_is_shared=passes_shares[source.source],
        )
        for number, plan in enumerate(schedule.steps)
        for request, of_request in enumerate(plan.requests)
        for piece, source in enumerate(of_request.pieces)
    }
    if num_ranks == 1:
        readings = dict.fromkeys(readings, Reading.AS_IS)
    return NodeTable(num_ranks, banks, tuple(is_split), readings)


def check_shares(schedule: Schedule, num_ranks: int) -> None:
    """Refuse a node axis of R ranks on which nothing can be cut: all would compute all.

    Raises:
        ConfigError: no bank has units that R ranks can share evenly.
    """

    def is_shared(parts: int) -> bool:
        return any(_bank_line(n, plan, parts).split for n, plan in enumerate(schedule.banks))

    if num_ranks == 1 or is_shared(num_ranks):
        return
    widest = max(plan.num_units for plan in schedule.banks)
    sizes = [size for size in range(1, num_ranks) if num_ranks % size == 0]
    fitting = [size for size in sizes if size == 1 or is_shared(size)]
    raise ConfigError(
        "the ranks of the node axis would own no units",
        where="parallel.node_parallel",
        found=f"{num_ranks} ranks for layers of at most {widest} units: "
        f"none has a multiple of {num_ranks}",
        expected=f"one of {', '.join(map(str, fitting))} for this circuit",
        fix=f"set parallel.node_parallel={fitting[-1]}, or give layers a multiple of {num_ranks} "
        "units (structure.num_states; latents.num_clusters for patches)",
    )


def _bank_line(number: int, plan: BankPlan, num_ranks: int) -> BankLine:
    blocks = Blocks(plan.blocks, plan.strided)
    in_order = plan.blocks > 1 and not plan.strided
    why = ""
    if plan.kind not in UNIT_DIM:
        why = "nothing to share"
    elif plan.num_units == 1:
        why = "one row"
    elif plan.num_units % num_ranks:
        why = f"not divisible by {num_ranks}"
    elif in_order and plan.blocks % num_ranks:
        why = f"{plan.blocks} blocks, not divisible by {num_ranks}"
    elif plan.strided and plan.num_units % (plan.blocks * num_ranks):
        why = f"{plan.num_units // plan.blocks} rows a block, not divisible by {num_ranks}"
    name = f"{plan.kind}_{number:04d}"
    if why:
        return BankLine(name, plan.num_units, None, blocks, why)
    if in_order:
        blocks = Blocks(plan.blocks // num_ranks)
    return BankLine(name, plan.num_units, Split(UNIT_DIM[plan.kind], num_ranks), blocks)


def _is_indicator(schedule: Schedule, step: int) -> bool:
    plan = schedule.steps[step]
    return isinstance(plan, InputPlan) and schedule.banks[plan.bank].kind == "indicator"


def _reads_slice(schedule: Schedule, is_split: Sequence[bool], step: int) -> bool:
    """Whether a step reads the units that it yields, or at least those of the same rank."""
    plan = schedule.steps[step]
    if not isinstance(plan, SumPlan):
        return is_split[step]
    bank = schedule.banks[plan.bank]
    return is_split[step] and bank.blocks > 1 and not bank.strided


def _passing_shares(schedule: Schedule, is_split: Sequence[bool]) -> list[bool]:
    """For each step, whether a rank passes down the flow of its own rows alone.

    Sums that are split do. So do whole steps without parameters whose readers all do, which saves
    adding up a flow before it is passed on.
    """
    passes = [False] * len(schedule.steps)
    for number in reversed(range(len(schedule.steps))):
        plan = schedule.steps[number]
        if isinstance(plan, SumPlan):
            passes[number] = is_split[number] and not _reads_slice(schedule, is_split, number)
        elif not isinstance(plan, InputPlan) and not is_split[number]:
            readers = [reader for reader, _, _ in schedule.fanouts[number].consumers]
            passes[number] = bool(readers) and all(passes[reader] for reader in readers)
    return passes


def _reading(
    is_split: bool, *, reads_slice: bool, passes_shares: bool, flow_is_shared: bool
) -> Reading:
    """How a step reads a message.

    Args:
        is_split: the message.
        reads_slice, passes_shares: of the step.
        flow_is_shared: whether the message's own step makes do with the flow of own rows.
    """
    if is_split:
        if reads_slice:
            return Reading.AS_IS
        return Reading.GATHER_SHARED if passes_shares else Reading.GATHER
    if reads_slice:
        return Reading.CUT
    return Reading.SHARE if passes_shares and not flow_is_shared else Reading.AS_IS
