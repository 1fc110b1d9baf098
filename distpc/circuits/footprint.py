"""What training a circuit takes, from its schedule alone: memory, matrix products, messages.

No tensor is made: sizes follow from the plans of `schedule`, so that circuits of any size can be
planned. Bytes are of the tensors that the functions of `layers`, `sums` and `look_up` save or make;
legend: E regions folded, B batch, K units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from distpc.circuits.schedule import (
    BankPlan,
    InputPlan,
    ProductPlan,
    Schedule,
    StepPlan,
    SumPlan,
)
from distpc.circuits.sharding import NodeTable, Reading, node_table
from distpc.circuits.stretches import between, stretches
from distpc.structures.region_graph import RegionGraph

FLOAT_BYTES = 4
_INDEX_BYTES = 8
_SCALE_ENTRIES = 4
"""Of a row's scale: two numbers of float64."""
_AGREEMENTS = 1
"""Ranks of the node axis agree once a pass on which samples to evaluate again."""
_PER_UNIT = {"gaussian": 3, "binomial": 2, "logistic": 2, "indicator": 0}
"""Entries of a unit, for the families whose statistics are no table over categories."""


@dataclass(frozen=True)
class StepCost:
    """One step of the schedule.

    Attributes:
        bank: its parameters, None for steps without any.
        kept: bytes a sample that its forward pass leaves for the backward pass.
        message: bytes a sample of what it yields, with its scale.
        flow: bytes a sample of the flow that arrives at it.
        passed: bytes a sample of the flows that it passes on.
        viewed: bytes of those that are the memory of its own flow.
        scratch: bytes a sample that its backward pass needs for a moment.
        exchanged: entries a sample that ranks of the node axis gather or scatter, in a forward and
            backward pass; one that is all-reduced counts twice.
        exchanges: collectives that they do it in.
        forward_exchanged, forward_exchanges: those of the forward pass.
        multiply_adds: a sample, of one pass.
    """

    bank: int | None
    kept: int = 0
    message: int = 0
    flow: int = 0
    passed: int = 0
    viewed: int = 0
    scratch: int = 0
    exchanged: int = 0
    exchanges: int = 0
    forward_exchanged: int = 0
    forward_exchanges: int = 0
    multiply_adds: int = 0


@dataclass(frozen=True)
class Footprint:
    """A circuit's sizes on one rank of the node axis.

    Attributes:
        graph, schedule: of the circuit.
        banks: entries of each parameter.
        state_units: units of the smallest wide region: shares of states are cut from these.
        steps: in order of evaluation.
        stretches: of steps whose messages the backward pass computes again; empty: all are kept.
    """

    graph: RegionGraph
    schedule: Schedule
    banks: tuple[int, ...]
    state_units: int
    steps: tuple[StepCost, ...]
    stretches: tuple[range, ...] = ()
    _shares: dict[int, Footprint] = field(default_factory=dict, repr=False)

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters."""
        return sum(self.banks)

    @property
    def num_banks(self) -> int:
        """Parameters."""
        return len(self.banks)

    @property
    def num_exchanges(self) -> int:
        """Collectives of the node axis in a forward and backward pass."""
        own = sum(step.exchanges for step in self.steps)
        if self.stretches:
            own += sum(step.forward_exchanges for step in self.steps)
        return own + _AGREEMENTS if own else 0

    @property
    def largest_bank(self) -> int:
        """Entries of the largest parameter, which is gathered and read out as a whole."""
        return max(self.banks)

    @property
    def multiply_adds(self) -> int:
        """Of a sample's forward pass; backward takes twice as many."""
        return sum(step.multiply_adds for step in self.steps)

    @property
    def exchanged(self) -> int:
        """Entries a sample that these move."""
        own = sum(step.exchanged for step in self.steps)
        if self.stretches:
            own += sum(step.forward_exchanged for step in self.steps)
        return own + 2 * _AGREEMENTS if own else 0

    @property
    def num_passes(self) -> int:
        """Products of matrices a sum and step: forward, backward two; and forward once more."""
        return 4 if self.stretches else 3

    @property
    def between(self) -> int:
        """Bytes a sample that pass from a stretch to another, which are kept."""
        return between(
            [step.message for step in self.steps], _readers(self.schedule), self.stretches
        )

    @property
    def kept(self) -> int:
        """Bytes a sample that one forward pass leaves for the backward pass."""
        return sum(step.kept for step in self.steps)


def footprint(
    graph: RegionGraph, schedule: Schedule, num_ranks: int = 1, *, recompute: bool = False
) -> Footprint:
    """The sizes of a compiled region graph.

    Args:
        graph: the structure.
        schedule: of `compile_graph`.
        num_ranks: R of the node axis; sizes are those of one of them.
        recompute: whether messages are computed again in the backward pass, in the stretches that
            are best for one rank that holds all.
    """
    table = node_table(schedule, num_ranks)
    whole = [graph.regions[plan.regions[0]].num_units for plan in schedule.steps]
    units = [
        count // num_ranks if is_split else count
        for count, is_split in zip(whole, table.is_split, strict=True)
    ]
    kept_outputs = _outputs_that_sums_keep(schedule, table)
    passed = [_passed_flows(plan, units) for plan in schedule.steps]
    arrived: dict[int, int] = defaultdict(int)
    for flows in passed:
        for flow in flows:
            arrived[flow.source] += FLOAT_BYTES * flow.entries
    steps = []
    for number, plan in enumerate(schedule.steps):
        reads = list(_reads(plan, number, table, whole, units))
        cost = _step_cost(schedule, number, plan, units, number in kept_outputs, reads)
        steps.append(
            replace(
                cost,
                message=FLOAT_BYTES * len(plan.regions) * (units[number] + _SCALE_ENTRIES),
                scratch=cost.scratch + FLOAT_BYTES * sum(read.scratch for read in reads),
                flow=arrived[number],
                passed=FLOAT_BYTES * sum(flow.entries for flow in passed[number]),
                viewed=FLOAT_BYTES * sum(flow.entries for flow in passed[number] if flow.is_view),
                exchanged=sum(read.exchanged for read in reads),
                exchanges=sum(read.exchanges for read in reads),
                forward_exchanged=sum(read.forward for read in reads),
                forward_exchanges=sum(read.forward > 0 for read in reads),
            )
        )
    wide = [count for count in whole if count > 1]
    banks = tuple(
        _entries(plan) // (line.split.parts if line.split else 1)
        for plan, line in zip(schedule.banks, table.banks, strict=True)
    )
    costs = Footprint(graph, schedule, banks, min(wide, default=1), tuple(steps))
    if not recompute:
        return costs
    whole_costs = costs if num_ranks == 1 else footprint(graph, schedule)
    kept, messages = zip(*((step.kept, step.message) for step in whole_costs.steps), strict=True)
    return replace(costs, stretches=stretches(kept, messages, _readers(schedule)))


def shared(costs: Footprint, ranks: int) -> Footprint:
    """The share of one of several ranks that own rows of every sum, and as many states.

    A rank computes its share of messages, and gathers whole what its sums read.

    Args:
        costs: of the whole circuit.
        ranks: on the node axis.
    """
    if ranks not in costs._shares:
        again = bool(costs.stretches)
        costs._shares[ranks] = footprint(costs.graph, costs.schedule, ranks, recompute=again)
    return costs._shares[ranks]


def backward_peak(
    costs: Footprint, batch: int, *, bank_copies: int, keeps_flows: bool, has_flows: bool
) -> int:
    """Most bytes of messages and flows at one moment of a forward and backward pass.

    Walks through the backward pass: messages are freed step by step while flows of parameters
    appear.

    Args:
        costs: the circuit's sizes.
        batch: B of the pass.
        bank_copies: copies of a step's parameters that its backward pass makes for a moment.
        keeps_flows: whether flows of parameters stay where they appear; else they are reduced at
            once, in buckets that are not counted here.
        has_flows: whether those of an earlier micro-batch are there already.
    """
    messages = (costs.between if costs.stretches else costs.kept) * batch
    begun_at = {numbers[-1]: numbers for numbers in costs.stretches}
    flows = FLOAT_BYTES * costs.num_parameters if has_flows and keeps_flows else 0
    arrived = FLOAT_BYTES * batch
    seen: set[int] = set()
    peak = messages + flows
    for number, step in reversed(list(enumerate(costs.steps))):
        again = begun_at.get(number, range(0))
        messages += sum(costs.steps[inner].kept for inner in again) * batch
        bank = 0 if step.bank is None else FLOAT_BYTES * costs.banks[step.bank]
        moment = messages + flows + arrived + (step.scratch + step.passed - step.viewed) * batch
        peak = max(peak, moment + bank_copies * bank)
        messages -= step.kept * batch
        arrived += (step.passed - step.flow) * batch
        if step.bank is not None and step.bank not in seen and keeps_flows and not has_flows:
            flows += bank
            seen.add(step.bank)
    return peak


def _readers(schedule: Schedule) -> list[list[int]]:
    """For each step the steps that read its message."""
    return [[number for number, _, _ in fanout.consumers] for fanout in schedule.fanouts]


def _outputs_that_sums_keep(schedule: Schedule, table: NodeTable) -> set[int]:
    """Steps whose message, or a view of it, some sum saves for its backward pass."""
    kept = set()
    for number, plan in enumerate(schedule.steps):
        if not isinstance(plan, SumPlan) or _is_copied(plan):
            continue
        if table.readings[number, 0, 0] in (Reading.AS_IS, Reading.SHARE):
            kept.add(plan.requests[0].pieces[0].source)
    return kept


class _Read(NamedTuple):
    """One message as a step reads it, in entries a sample.

    Attributes:
        entries: of the message.
        is_copy: whether it is another tensor than the one that its source made.
        exchanged, exchanges: see `StepCost`.
        scratch: that its backward pass needs for a moment.
        forward: of `exchanged`, those of the forward pass.
    """

    entries: int
    is_copy: bool = False
    exchanged: int = 0
    exchanges: int = 0
    scratch: int = 0
    forward: int = 0


def _reads(
    plan: StepPlan, number: int, table: NodeTable, whole: list[int], units: list[int]
) -> Iterator[_Read]:
    for request, of_request in enumerate(plan.requests):
        for place, piece in enumerate(of_request.pieces):
            rows, ranks = len(piece.rows), table.num_ranks
            every = rows * whole[piece.source]
            with_scales = every + _SCALE_ENTRIES * rows * ranks
            reading = table.readings[number, request, place]
            if reading is Reading.GATHER:
                yield _Read(every, True, with_scales, 1, every, with_scales)
            elif reading is Reading.GATHER_SHARED:
                # The flow, its parts side by side, and those of other ranks.
                yield _Read(every, True, with_scales + every, 2, 3 * every, with_scales)
            elif reading is Reading.CUT:
                yield _Read(every // ranks, True, every, 1, 2 * every)
            elif reading is Reading.SHARE:
                yield _Read(every, False, 2 * every, 1, every)
            else:
                yield _Read(rows * units[piece.source])


def _is_copied(plan: SumPlan) -> bool:
    """Whether a sum reads a message that was gathered from several, or put into its order."""
    return len(plan.requests[0].pieces) > 1 or plan.requests[0].order is not None


def _entries(plan: BankPlan) -> int:
    if plan.kind == "sum":
        return sum(plan.num_units * fan_in for fan_in in plan.sizes)
    if plan.kind in _PER_UNIT:
        return len(plan.owners) * _PER_UNIT[plan.kind] * plan.num_units
    return sum(plan.sizes) * plan.num_units


class _Flow(NamedTuple):
    """What a step passes to one that it reads, in entries a sample."""

    source: int
    entries: int
    is_view: bool


def _passed_flows(plan: StepPlan, units: list[int]) -> list[_Flow]:
    """The flow that a step passes to each piece that it reads.

    A product hands its own flow on as views where it can; they share one piece of memory.
    """
    flows = [
        _Flow(
            piece.source,
            len(piece.rows) * units[piece.source],
            isinstance(plan, ProductPlan) and _is_view(plan, number, len(piece.rows)),
        )
        for request in plan.requests
        for number, piece in enumerate(request.pieces)
    ]
    total = sum(flow.entries for flow in flows if flow.is_view)
    own = len(plan.regions) * units[flows[0].source] if flows else 0
    return [
        flow._replace(entries=own * flow.entries // total) if flow.is_view else flow
        for flow in flows
    ]


def _is_view(plan: ProductPlan, piece: int, num_rows: int) -> bool:
    """Whether a product's flow to a piece is a slice of its own."""
    terms = [term for term in plan.terms if term.piece == piece]
    if len(terms) != 1 or terms[0].rows != tuple(range(num_rows)):
        return False
    targets = terms[0].targets
    return targets == tuple(range(targets[0], targets[0] + len(targets)))


def _step_cost(
    schedule: Schedule,
    number: int,
    plan: StepPlan,
    units: list[int],
    is_kept: bool,
    reads: list[_Read],
) -> StepCost:
    """All but flows and exchanges."""
    rows = len(plan.regions)
    message = FLOAT_BYTES * rows * units[number]
    kept = message if is_kept else 0
    # A message with several readers is dealt to them, which concatenates their flows.
    scratch = message if len(schedule.fanouts[number].sizes) > 1 else 0
    if isinstance(plan, InputPlan):
        return StepCost(plan.bank, kept + _INDEX_BYTES * rows * len(plan.bags[0]), scratch=scratch)
    if not isinstance(plan, SumPlan):
        return StepCost(None, kept, scratch=scratch)
    bank = schedule.banks[plan.bank]
    read = sum(read.entries for read in reads)
    is_copy = _is_copied(plan) or any(read.is_copy for read in reads)
    return StepCost(
        plan.bank,
        # Its own message too, and the one that it reads where that is a copy.
        kept=message + (FLOAT_BYTES * read if is_copy else 0),
        scratch=scratch + message,
        multiply_adds=rows * units[number] * bank.sizes[0],
    )
