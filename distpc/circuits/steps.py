"""The steps of a compiled circuit as torch modules, and the loop that runs them.

Every step can run in two domains: scaled values (fast), or logs (any range; float64). The flows
that backward delivers are the same in both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distpc.circuits.evidence import Evidence
from distpc.circuits.gaussian import GaussianBank, ScaleLogsFunction
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.layers import (
    WEAK,
    ConcatFunction,
    ProductFunction,
    ProductLayer,
    RescaleFunction,
    RootFunction,
)
from distpc.circuits.lost import divide_, is_untrustworthy, mix, new_scale
from distpc.circuits.rows import Rows
from distpc.circuits.schedule import (
    BankPlan,
    Fanout,
    InputPlan,
    ProductPlan,
    Request,
    Schedule,
    StepPlan,
    SumPlan,
)
from distpc.circuits.sums import SumBank

Bank = SumBank | CategoricalBank | GaussianBank


class Message(NamedTuple):
    """Values (E, B, K) with scale (E, B, 2), see `lost`; or logs with None.

    `is_weak` (B,) marks samples that the scaled domain may have lost, None for none.
    """

    values: Tensor
    scale: Tensor | None
    is_weak: Tensor | None = None


class Step(nn.Module):
    """Base of the steps: which rows of which messages it reads, and to whom it deals its own."""

    def __init__(self, plan: StepPlan, fanout: Fanout) -> None:
        super().__init__()
        self.regions = plan.regions
        self.num_pieces = [len(request.pieces) for request in plan.requests]
        self.orders = nn.ModuleList([_order(request) for request in plan.requests])
        self.deal_order = None if fanout.order is None or not fanout.sizes else Rows(fanout.order)
        self.deal_sizes = list(fanout.sizes)
        self.consumers = fanout.consumers
        latents = [] if isinstance(plan, SumPlan) else list(plan.latents)
        has_latents = any(latent >= 0 for latent in latents)
        self.latents: Tensor | None
        self.register_buffer(
            "latents", torch.tensor(latents) if has_latents else None, persistent=False
        )

    def run(
        self,
        bank: Bank | None,
        requests: list[list[Message]],
        evidence: Evidence,
        num_units: int,
        in_logs: bool,
    ) -> Message:
        """Evaluate the step."""
        raise TypeError("a step of no kind")

    def gather(self, pieces: list[Message], request: int) -> Message:
        """One message of the pieces that a request got."""
        if len(pieces) == 1 and isinstance(self.orders[request], nn.Identity):
            return pieces[0]
        values = torch.cat([piece.values for piece in pieces])
        scales = [piece.scale for piece in pieces if piece.scale is not None]
        scale = torch.cat(scales) if scales else None
        order = self.orders[request]
        if isinstance(order, Rows):
            values = order.take(values)
            scale = None if scale is None else order.take(scale)
        return Message(values, scale)

    def deal(self, message: Message) -> list[Message]:
        """The parts of this step's message, one for each consumer."""
        values, scale = message.values, message.scale
        if self.deal_order is not None:
            values = self.deal_order.take(values)
            scale = None if scale is None else self.deal_order.take(scale)
        if len(self.deal_sizes) <= 1:
            return [Message(values, scale)] * len(self.deal_sizes)
        # One split: its backward is one concatenation, where slices would each fill a whole
        # message with zeros.
        parts = values.split(self.deal_sizes)
        if scale is None:
            return [Message(part, None) for part in parts]
        return [Message(*part) for part in zip(parts, scale.split(self.deal_sizes), strict=True)]


def _order(request: Request) -> nn.Module:
    return nn.Identity() if request.order is None else Rows(request.order)


class CategoricalStep(Step):
    """Categorical inputs, or products of them."""

    variables: Tensor
    offsets: Tensor

    def __init__(
        self, plan: InputPlan, fanout: Fanout, bank: BankPlan, variables: Sequence[int]
    ) -> None:
        super().__init__(plan, fanout)
        table_of = {owner: t for t, owners in enumerate(bank.owners) for owner in owners}
        starts = [sum(bank.sizes[:table]) for table in range(len(bank.sizes))]
        self.bank = plan.bank
        self.bags = plan.bags
        self.num_rows = sum(bank.sizes)
        self.tables = tuple(tuple(table_of[child] for child in bag) for bag in plan.bags)
        offsets = [[starts[table] for table in tables] for tables in self.tables]
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        bag_variables = [[variables[child] for child in bag] for bag in plan.bags]
        self.register_buffer("variables", torch.tensor(bag_variables), persistent=False)

    def run(
        self,
        bank: Bank | None,
        requests: list[list[Message]],
        evidence: Evidence,
        num_units: int,
        in_logs: bool,
    ) -> Message:
        assert isinstance(bank, CategoricalBank)
        codes = evidence.codes[self.variables]
        index = torch.where(codes < 0, self.num_rows, codes + self.offsets.unsqueeze(-1))
        mask = evidence.mask(self.latents, num_units)
        return Message(*bank(index.mT.contiguous(), mask, in_logs))


class GaussianStep(Step):
    """Gaussian inputs."""

    variables: Tensor
    tables: Tensor

    def __init__(
        self, plan: InputPlan, fanout: Fanout, bank: BankPlan, variables: Sequence[int]
    ) -> None:
        super().__init__(plan, fanout)
        table_of = {owner: t for t, owners in enumerate(bank.owners) for owner in owners}
        self.bank = plan.bank
        self.bags = plan.bags
        rows = [bag[0] for bag in plan.bags]
        self.register_buffer(
            "tables", torch.tensor([table_of[row] for row in rows]), persistent=False
        )
        self.register_buffer(
            "variables", torch.tensor([variables[row] for row in rows]), persistent=False
        )

    def run(
        self,
        bank: Bank | None,
        requests: list[list[Message]],
        evidence: Evidence,
        num_units: int,
        in_logs: bool,
    ) -> Message:
        assert isinstance(bank, GaussianBank) and evidence.reals is not None
        centre = bank.centre[self.tables].unsqueeze(1)
        spread = bank.spread[self.tables].unsqueeze(1)
        z = (evidence.reals[self.variables] - centre) / spread
        logs = bank(z, self.tables, in_logs, evidence.mask(self.latents, num_units))
        return Message(logs, None) if in_logs else Message(*ScaleLogsFunction.apply(logs))


class SumStep(Step):
    """Sums of one bank."""

    def __init__(self, plan: SumPlan, fanout: Fanout) -> None:
        super().__init__(plan, fanout)
        self.rescale = plan.rescale
        self.rows_per_table = plan.rows_per_table

    def run(
        self,
        bank: Bank | None,
        requests: list[list[Message]],
        evidence: Evidence,
        num_units: int,
        in_logs: bool,
    ) -> Message:
        assert isinstance(bank, SumBank)
        values, scale, _ = self.gather(requests[0], 0)
        values, smallest = bank(values, in_logs)
        if scale is None:
            return Message(values, None)
        scale = mix(scale, smallest, values.detach())
        if not self.rescale:
            return Message(values, scale)
        values, log_top, is_weak = RescaleFunction.apply(values)
        scale[..., 0] += log_top
        return Message(values, divide_(scale, log_top), is_weak)


class ProductStep(Step):
    """Products of one level."""

    def __init__(self, plan: ProductPlan, fanout: Fanout) -> None:
        super().__init__(plan, fanout)
        self.layer = ProductLayer(plan)

    def run(
        self,
        bank: Bank | None,
        requests: list[list[Message]],
        evidence: Evidence,
        num_units: int,
        in_logs: bool,
    ) -> Message:
        values = [piece.values for piece in requests[0]]
        mask = evidence.mask(self.latents, num_units)
        if in_logs:
            return Message(self.layer.add(values, mask), None)
        out, log_top, lost, is_weak = ProductFunction.apply(self.layer, mask, *values)
        scale = new_scale(log_top, torch.zeros_like(lost))
        for factor in self.layer.factors:
            of_factor = requests[0][factor.piece].scale
            assert of_factor is not None
            factor.targets.add_(scale, factor.rows.take(of_factor))
        divide_(scale, log_top)[..., 1] += lost
        return Message(out, scale, is_weak)


class ConcatStep(Step):
    """Units of several regions side by side."""

    def run(
        self,
        bank: Bank | None,
        requests: list[list[Message]],
        evidence: Evidence,
        num_units: int,
        in_logs: bool,
    ) -> Message:
        groups = [self.gather(pieces, number) for number, pieces in enumerate(requests)]
        mask = evidence.mask(self.latents, num_units)
        values = [group.values for group in groups]
        if in_logs:
            logs = torch.cat(values, dim=-1)
            return Message(logs if mask is None else torch.where(mask, logs, -torch.inf), None)
        scales = [group.scale for group in groups]
        return Message(*ConcatFunction.apply(mask, scales, *values))


def build_step(
    plan: StepPlan, fanout: Fanout, banks: Sequence[BankPlan], variables: Sequence[int]
) -> Step:
    """The module of a plan; `variables` holds the variable of each input region."""
    if isinstance(plan, InputPlan):
        bank = banks[plan.bank]
        if bank.kind == "gaussian":
            return GaussianStep(plan, fanout, bank, variables)
        return CategoricalStep(plan, fanout, bank, variables)
    if isinstance(plan, SumPlan):
        return SumStep(plan, fanout)
    if isinstance(plan, ProductPlan):
        return ProductStep(plan, fanout)
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
    banks: Sequence[Bank],
    num_units: Sequence[int],
    evidence: Evidence,
    *,
    in_logs: bool,
    keep: bool,
) -> Pass:
    """Evaluate every step, children first."""
    inbox: dict[int, dict[tuple[int, int], Message]] = defaultdict(dict)
    is_weak = torch.zeros(evidence.codes.shape[1], dtype=torch.bool, device=evidence.codes.device)
    outputs: list[Tensor] = []
    root: Message | None = None
    for number, step in enumerate(steps):
        arrived = inbox.pop(number, {})
        requests = [
            [arrived[request, piece] for piece in range(count)]
            for request, count in enumerate(step.num_pieces)
        ]
        plan = schedule.steps[number]
        bank = banks[plan.bank] if isinstance(plan, InputPlan | SumPlan) else None
        message = step.run(bank, requests, evidence, num_units[number], in_logs)
        if message.is_weak is not None:
            is_weak |= message.is_weak
        if keep:
            if torch.is_grad_enabled() and not message.values.requires_grad:
                message.values.requires_grad_()
            outputs.append(message.values)
        for consumer, part in zip(step.consumers, step.deal(message), strict=True):
            inbox[consumer[0]][consumer[1:]] = part
        if number == schedule.root[0]:
            root = message
    assert root is not None
    row = schedule.root[1]
    values = root.values[row, :, 0]
    if root.scale is None:
        return Pass(RootFunction.apply(values, None), is_weak, outputs)
    scale = root.scale[row]
    is_weak |= ~(values.detach() >= WEAK) | is_untrustworthy(scale, values.detach())
    return Pass(RootFunction.apply(values, scale), is_weak, outputs)
