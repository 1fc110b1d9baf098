"""What training a circuit takes, from its schedule alone: memory, matrix products, messages.

No tensor is made: sizes follow from the plans of `schedule`, so that circuits of any size can be
planned. Bytes are of the tensors that the functions of `layers`, `sums` and `look_up` save or make;
legend: E regions folded, B batch, K units.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from distpc.circuits.schedule import (
    BankPlan,
    InputPlan,
    ProductPlan,
    Schedule,
    StepPlan,
    SumPlan,
)
from distpc.structures.region_graph import RegionGraph

FLOAT_BYTES = 4
_INDEX_BYTES = 8
_PER_UNIT = {"gaussian": 3, "binomial": 2, "logistic": 2, "indicator": 0}
"""Entries of a unit, for the families whose statistics are no table over categories."""


@dataclass(frozen=True)
class StepCost:
    """One step of the schedule.

    Attributes:
        bank: its parameters, None for steps without any.
        kept: bytes a sample that its forward pass leaves for the backward pass.
        flow: bytes a sample of the flow that arrives at it.
        passed: bytes a sample of the flows that it passes on.
        scratch: bytes a sample that its backward pass needs for a moment.
        gathered: entries a sample of the message that a sum reads, which ranks that share its rows
            have to gather; 0 elsewhere.
        multiply_adds: a sample, of one pass.
    """

    bank: int | None
    kept: int = 0
    flow: int = 0
    passed: int = 0
    scratch: int = 0
    gathered: int = 0
    multiply_adds: int = 0


@dataclass(frozen=True)
class Footprint:
    """A circuit's sizes.

    Attributes:
        banks: entries of each parameter.
        state_units: units of the smallest wide region: shares of states are cut from these.
        steps: in order of evaluation.
    """

    banks: tuple[int, ...]
    state_units: int
    steps: tuple[StepCost, ...]

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters."""
        return sum(self.banks)

    @property
    def largest_bank(self) -> int:
        """Entries of the largest parameter, which is gathered and read out as a whole."""
        return max(self.banks)

    @property
    def multiply_adds(self) -> int:
        """Of a sample's forward pass; backward takes twice as many."""
        return sum(step.multiply_adds for step in self.steps)

    @property
    def gathered(self) -> int:
        """Entries a sample of all messages that sums read."""
        return sum(step.gathered for step in self.steps)

    @property
    def kept(self) -> int:
        """Bytes a sample that one forward pass leaves for the backward pass."""
        return sum(step.kept for step in self.steps)


def footprint(graph: RegionGraph, schedule: Schedule) -> Footprint:
    """The sizes of a compiled region graph.

    Args:
        graph: the structure.
        schedule: of `compile_graph`.
    """
    units = [graph.regions[plan.regions[0]].num_units for plan in schedule.steps]
    kept_outputs = _outputs_that_sums_keep(schedule)
    steps = [
        _step_cost(schedule, number, plan, units, number in kept_outputs)
        for number, plan in enumerate(schedule.steps)
    ]
    wide = [count for count in units if count > 1]
    banks = tuple(_entries(plan) for plan in schedule.banks)
    return Footprint(banks, min(wide, default=1), tuple(steps))


def shared(costs: Footprint, ranks: int, message_bytes: int = FLOAT_BYTES) -> Footprint:
    """The share of one of several ranks that own rows of every sum, and as many states.

    A rank computes its share of all messages, and gathers whole what its sums read.

    Args:
        costs: of the whole circuit.
        ranks: on the node axis.
        message_bytes: of one entry of a message that sums read: 4, or 2 in bfloat16.
    """
    if ranks == 1 and message_bytes == FLOAT_BYTES:
        return costs
    steps = []
    for step in costs.steps:
        whole = message_bytes * step.gathered if ranks > 1 else 0
        saved = (FLOAT_BYTES - message_bytes) * step.gathered // ranks
        steps.append(
            replace(
                step,
                kept=max(0, step.kept // ranks - saved) + whole,
                flow=step.flow // ranks,
                passed=step.passed // ranks,
                scratch=step.scratch // ranks + whole,
                multiply_adds=step.multiply_adds // ranks,
            )
        )
    banks = tuple(-(-bank // ranks) for bank in costs.banks)
    return replace(costs, banks=banks, steps=tuple(steps))


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
    messages = costs.kept * batch
    flows = FLOAT_BYTES * costs.num_parameters if has_flows and keeps_flows else 0
    arrived = FLOAT_BYTES * batch
    seen: set[int] = set()
    peak = messages + flows
    for step in reversed(costs.steps):
        bank = 0 if step.bank is None else FLOAT_BYTES * costs.banks[step.bank]
        moment = messages + flows + arrived + (step.scratch + step.passed) * batch
        peak = max(peak, moment + bank_copies * bank)
        messages -= step.kept * batch
        arrived += (step.passed - step.flow) * batch
        if step.bank is not None and step.bank not in seen and keeps_flows and not has_flows:
            flows += bank
            seen.add(step.bank)
    return peak


def _outputs_that_sums_keep(schedule: Schedule) -> set[int]:
    """Steps whose message, or a view of it, some sum saves for its backward pass."""
    kept = set()
    for plan in schedule.steps:
        if isinstance(plan, SumPlan) and not _is_copied(plan):
            kept.add(plan.requests[0].pieces[0].source)
    return kept


def _is_copied(plan: SumPlan) -> bool:
    """Whether a sum reads a message that was gathered from several, or put into its order."""
    return len(plan.requests[0].pieces) > 1 or plan.requests[0].order is not None


def _entries(plan: BankPlan) -> int:
    if plan.kind == "sum":
        return sum(plan.num_units * fan_in for fan_in in plan.sizes)
    if plan.kind in _PER_UNIT:
        return len(plan.owners) * _PER_UNIT[plan.kind] * plan.num_units
    return sum(plan.sizes) * plan.num_units


def _step_cost(
    schedule: Schedule, number: int, plan: StepPlan, units: list[int], is_kept: bool
) -> StepCost:
    rows = len(plan.regions)
    message = FLOAT_BYTES * rows * units[number]
    read = _entries_read(plan, units)
    # A message with several readers is dealt to them, which concatenates their flows.
    scratch = message if len(schedule.fanouts[number].sizes) > 1 else 0
    if isinstance(plan, InputPlan):
        kept = _INDEX_BYTES * rows * len(plan.bags[0])
        return StepCost(plan.bank, kept + message * is_kept, message, 0, scratch)
    if isinstance(plan, SumPlan):
        bank = schedule.banks[plan.bank]
        copied = FLOAT_BYTES * read if _is_copied(plan) else 0
        return StepCost(
            plan.bank,
            kept=message + copied,
            flow=message,
            passed=FLOAT_BYTES * read,
            scratch=scratch + message,
            gathered=read if units[number] > 1 else 0,
            multiply_adds=rows * bank.num_units * bank.sizes[0],
        )
    passed = FLOAT_BYTES * read
    if isinstance(plan, ProductPlan) and len(plan.terms) == 1:
        passed = 0
    return StepCost(None, message * is_kept, message, passed, scratch)


def _entries_read(plan: StepPlan, units: list[int]) -> int:
    """Entries a sample of all messages that a step reads."""
    rows: dict[int, int] = defaultdict(int)
    for request in plan.requests:
        for piece in request.pieces:
            rows[piece.source] += len(piece.rows)
    return sum(count * units[source] for source, count in rows.items())
