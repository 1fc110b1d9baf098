"""The inner steps of a compiled circuit as torch modules, and the loop that runs all steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distpc.circuits.evidence import Evidence
from distpc.circuits.families import FAMILIES
from distpc.circuits.input_steps import RealStep, TableStep
from distpc.circuits.layers import (
    WEAK,
    ConcatFunction,
    KroneckerFunction,
    ProductFunction,
    ProductLayer,
    RescaleFunction,
    RootFunction,
)
from distpc.circuits.lost import MAX_NATS, Scale, is_untrustworthy, mix
from distpc.circuits.recompute import again_in_backward
from distpc.circuits.schedule import (
    BankPlan,
    Fanout,
    InputPlan,
    KroneckerPlan,
    ProductPlan,
    Schedule,
    StepPlan,
    SumPlan,
)
from distpc.circuits.step import Exchange, Message, Place, Step, Stretch, seal
from distpc.circuits.sums import SumBank


class SumStep(Step):
    """Sums of one bank."""

    def __init__(self, plan: SumPlan, fanout: Fanout) -> None:
        super().__init__(plan, fanout)
        self.rescale = plan.rescale
        self.rows_per_table = plan.rows_per_table

    def run(
        self,
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        assert isinstance(bank, SumBank)
        values, scale, _ = self.gather(requests[0], 0)
        values, smallest = bank(values, in_logs)
        if scale is None:
            return Message(values, None)
        if scale.lost is not None or smallest is not None:
            scale = mix(scale, smallest, values.detach(), bank.smallest_weights)
        if not self.rescale:
            return Message(values, scale)
        values, log_top, is_weak = RescaleFunction.apply(values)
        return Message(values, scale.divided(log_top), is_weak)


class ProductStep(Step):
    """Products of one level."""

    def __init__(self, plan: ProductPlan, fanout: Fanout) -> None:
        super().__init__(plan, fanout)
        self.layer = ProductLayer(plan)

    def run(
        self,
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        values = [piece.values for piece in requests[0]]
        mask = evidence.mask(self.latents, units)
        if in_logs:
            return Message(self.layer.add(values, mask), None)
        out, log_top, lost, is_weak = ProductFunction.apply(self.layer, mask, *values)
        return Message(out, self._scale(requests[0], log_top, lost), is_weak)

    def _scale(self, pieces: list[Message], log_top: Tensor, lost: Tensor | None) -> Scale:
        """Log-scales add up, and so do losses; `log_top` becomes the sum of the logs."""
        scales = [piece.scale for piece in pieces]
        of_factors = None
        if any(scale is not None and scale.lost is not None for scale in scales):
            of_factors = torch.zeros_like(log_top)
            for factor in self.layer.factors:
                scale = scales[factor.piece]
                if scale is not None and scale.lost is not None:
                    factor.targets.add_(of_factors, factor.rows.take(scale.lost))
            of_factors *= (-log_top).clamp_max(MAX_NATS).exp_()
        for factor in self.layer.factors:
            scale = scales[factor.piece]
            if scale is not None and scale.log is not None:
                factor.targets.add_(log_top, factor.rows.take(scale.log))
        return Scale(log_top, of_factors).losing(lost)


class KroneckerStep(Step):
    """All products of a unit of the left and a unit of the right child."""

    def run(
        self,
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        left, right = (self.gather(pieces, number) for number, pieces in enumerate(requests))
        mask = evidence.mask(self.latents, units)
        if left.scale is None or right.scale is None:
            logs = (left.values.unsqueeze(-1) + right.values.unsqueeze(-2)).flatten(-2)
            return Message(logs if mask is None else torch.where(mask, logs, -torch.inf), None)
        out, log_top, lost, is_weak = KroneckerFunction.apply(mask, left.values, right.values)
        log = left.scale.log
        if log is not None and right.scale.log is not None:
            log = log + right.scale.log
        scale = Scale(log, left.scale.lost).losing(right.scale.lost)
        scale = scale.divided(log_top).losing(lost)
        return Message(out, scale, is_weak)


class ConcatStep(Step):
    """Units of several regions side by side."""

    def run(
        self,
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        groups = [self.gather(pieces, number) for number, pieces in enumerate(requests)]
        mask = evidence.mask(self.latents, units)
        values = [group.values for group in groups]
        if in_logs:
            logs = torch.cat(values, dim=-1)
            return Message(logs if mask is None else torch.where(mask, logs, -torch.inf), None)
        scales = [group.scale for group in groups]
        out, halves, is_weak = ConcatFunction.apply(mask, scales, *values)
        return Message(out, Scale.of(halves), is_weak)


def build_step(
    plan: StepPlan, fanout: Fanout, banks: Sequence[BankPlan], variables: Sequence[int]
) -> Step:
    """The module of a plan; `variables` holds the variable of each input region."""
    if isinstance(plan, InputPlan):
        bank = banks[plan.bank]
        if FAMILIES[bank.kind].is_real:
            return RealStep(plan, fanout, bank, variables)
        return TableStep(plan, fanout, bank, variables)
    if isinstance(plan, SumPlan):
        return SumStep(plan, fanout)
    if isinstance(plan, ProductPlan):
        return ProductStep(plan, fanout)
    if isinstance(plan, KroneckerPlan):
        return KroneckerStep(plan, fanout)
    return ConcatStep(plan, fanout)


class Pass(NamedTuple):
    """One bottom-up pass.

    Attributes:
        log_prob: (B,) float32.
        is_weak: (B,) bool, samples to evaluate again in logs.
        outputs: the message values of every step, kept for queries (else empty).
    """

    log_prob: Tensor
    is_weak: Tensor
    outputs: list[Tensor]


def run_steps(
    schedule: Schedule,
    steps: Sequence[Step],
    banks: Sequence[nn.Module],
    units: Sequence[range],
    evidence: Evidence,
    *,
    in_logs: bool,
    keep: bool,
    exchange: Exchange | None = None,
    stretches: Sequence[range] | None = None,
) -> Pass:
    """Evaluate every step, children first.

    Args:
        schedule: what is evaluated.
        steps, banks: its modules.
        units: that each step yields.
        evidence: of B samples.
        in_logs: the domain.
        keep: keep the message of every step.
        exchange: with processes that share the units; None where all of them are here.
        stretches: of steps, whose inner messages backward computes again, see `recompute`.
    """

    def run(numbers: range, arrived: dict[Place, Message]) -> Stretch:
        return _run_stretch(
            schedule, steps, banks, units, evidence, numbers, arrived, in_logs, keep, exchange
        )

    waiting: dict[Place, Message] = {}
    is_weak = torch.zeros(evidence.codes.shape[1], dtype=torch.bool, device=evidence.codes.device)
    outputs: list[Tensor] = []
    added: list[Tensor] = []
    root: Message | None = None
    for numbers in stretches or [range(len(steps))]:
        arrived = {place: waiting.pop(place) for place in list(waiting) if place[0] in numbers}
        of_stretch = partial(run, numbers)
        if stretches:
            read = _parameters(schedule, banks, numbers)
            made = again_in_backward(of_stretch, arrived, read)
        else:
            made = of_stretch(arrived)
        waiting |= made.sent
        is_weak |= made.is_weak
        outputs += made.outputs
        added += made.added
        root = made.root or root
    assert root is not None
    row = schedule.root[1]
    values = root.values[row, :, 0]
    if root.scale is None:
        return Pass(RootFunction.apply(values, None), is_weak, outputs)
    is_weak |= ~(values.detach() >= WEAK)
    if root.scale.lost is not None:
        is_weak |= is_untrustworthy(root.scale.lost[row], values.detach())
    if exchange is not None:
        is_weak = exchange.agree(is_weak)
    log_scale = root.scale.log[row] if root.scale.log is not None else torch.cat(added).sum(0)
    return Pass(RootFunction.apply(values, log_scale), is_weak, outputs)


def _parameters(
    schedule: Schedule, banks: Sequence[nn.Module], numbers: range
) -> list[nn.Parameter]:
    """Those that steps read."""
    plans = [schedule.steps[number] for number in numbers]
    used = {plan.bank for plan in plans if isinstance(plan, InputPlan | SumPlan)}
    return [parameter for number in sorted(used) for parameter in banks[number].parameters()]


def _run_stretch(
    schedule: Schedule,
    steps: Sequence[Step],
    banks: Sequence[nn.Module],
    units: Sequence[range],
    evidence: Evidence,
    numbers: range,
    arrived: dict[Place, Message],
    in_logs: bool,
    keep: bool,
    exchange: Exchange | None,
) -> Stretch:
    """Evaluate some consecutive steps; see `run_steps`."""
    inbox: dict[int, dict[tuple[int, int], Message]] = defaultdict(dict)
    for (number, request, piece), message in arrived.items():
        inbox[number][request, piece] = message
    is_weak = torch.zeros(evidence.codes.shape[1], dtype=torch.bool, device=evidence.codes.device)
    outputs: list[Tensor] = []
    added: list[Tensor] = []
    root: Message | None = None
    for number in numbers:
        step, read = steps[number], inbox.pop(number, {})
        if exchange is not None:
            read = {place: exchange.bring(m, number, *place) for place, m in read.items()}
            for message in read.values():
                is_weak |= False if message.is_weak is None else message.is_weak
        requests = [
            [read[request, piece] for piece in range(count)]
            for request, count in enumerate(step.num_pieces)
        ]
        plan = schedule.steps[number]
        bank = banks[plan.bank] if isinstance(plan, InputPlan | SumPlan) else None
        message = step.run(bank, requests, evidence, units[number], in_logs)
        if isinstance(plan, InputPlan):
            message = seal(message)
        if message.is_weak is not None:
            is_weak |= message.is_weak
        if schedule.reads_once and message.scale is not None and message.scale.log is not None:
            added.append(message.scale.log)
            message = message._replace(scale=Scale(None, message.scale.lost))
        if keep:
            if torch.is_grad_enabled() and not message.values.requires_grad:
                message.values.requires_grad_()
            outputs.append(message.values)
        for consumer, part in zip(step.consumers, step.deal(message), strict=True):
            inbox[consumer[0]][consumer[1:]] = part
        if number == schedule.root[0]:
            root = message
    sent = {(number, *place): m for number, box in inbox.items() for place, m in box.items()}
    return Stretch(sent, is_weak, outputs, added, root)
