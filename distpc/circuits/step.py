"""What all steps of a compiled circuit have in common: messages, and who reads which rows.

Every step can run in two domains: scaled values (fast), or logs (any range; float64). The flows
that backward delivers are the same in both.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distpc.circuits.evidence import Evidence
from distpc.circuits.lost import Scale, may_hold
from distpc.circuits.rows import Rows
from distpc.circuits.schedule import Fanout, Request, StepPlan, SumPlan


class Message(NamedTuple):
    """Values (E, B, K) with their scale, see `lost`; or logs with None.

    `is_weak` (B,) marks samples that the scaled domain may have lost, None for none.
    """

    values: Tensor
    scale: Scale | None
    is_weak: Tensor | None = None


Place = tuple[int, int, int]
"""Where a message is read: step, request, piece."""


class Stretch(NamedTuple):
    """What consecutive steps made.

    Attributes:
        sent: messages for later steps, by (step, request, piece).
        is_weak: (B,) bool, samples to evaluate again in logs.
        outputs: the message values of every step, where they are kept.
        added: log-scales that enter the likelihood without being routed.
        root: the root's message, if it is among them.
    """

    sent: dict[Place, Message]
    is_weak: Tensor
    outputs: list[Tensor]
    added: list[Tensor]
    root: Message | None


class Exchange(Protocol):
    """With other processes, each of which evaluates a share of the units; see `sharding`."""

    def bring(self, message: Message, step: int, request: int, piece: int) -> Message:
        """The message as that step has to read it."""

    def agree(self, is_weak: Tensor) -> Tensor:
        """Samples (B,) that any of the processes marks."""


def seal(message: Message) -> Message:
    """The message of inputs, whose scale comes as one tensor (E, B, 2).

    A log-scale of -inf marks an observation that no unit can make: its sample is evaluated again
    in logs, and here its units become 1, so that no sum is 0.
    """
    if message.scale is None:
        return message
    halves: Any = message.scale
    is_dead = halves[..., 0].isneginf()
    if not may_hold(is_dead):
        return Message(message.values, Scale.of(halves))
    scale = Scale.of(torch.where(is_dead.unsqueeze(-1), 0.0, halves))
    return Message(message.values.masked_fill(is_dead.unsqueeze(-1), 1.0), scale, is_dead.any(0))


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
        bank: nn.Module | None,
        requests: list[list[Message]],
        evidence: Evidence,
        units: range,
        in_logs: bool,
    ) -> Message:
        """Evaluate the step."""
        raise TypeError("a step of no kind")

    def gather(self, pieces: list[Message], request: int) -> Message:
        """One message of the pieces that a request got."""
        if len(pieces) == 1 and isinstance(self.orders[request], nn.Identity):
            return pieces[0]
        values = torch.cat([piece.values for piece in pieces])
        scale = _concatenated(pieces)
        order = self.orders[request]
        if isinstance(order, Rows):
            values = order.take(values)
            scale = None if scale is None else scale.each(order.take)
        return Message(values, scale)

    def deal(self, message: Message) -> list[Message]:
        """The parts of this step's message, one for each consumer."""
        values, scale = message.values, message.scale
        if self.deal_order is not None:
            values = self.deal_order.take(values)
            scale = None if scale is None else scale.each(self.deal_order.take)
        if len(self.deal_sizes) <= 1:
            return [Message(values, scale)] * len(self.deal_sizes)
        # One split: its backward is one concatenation, where slices would each fill a whole
        # message with zeros.
        parts = values.split(self.deal_sizes)
        if scale is None:
            return [Message(part, None) for part in parts]
        nothing = [None] * len(parts)
        logs = nothing if scale.log is None else scale.log.split(self.deal_sizes)
        lost = nothing if scale.lost is None else scale.lost.split(self.deal_sizes)
        return [Message(p, Scale(*halves)) for p, *halves in zip(parts, logs, lost, strict=True)]


def _concatenated(pieces: list[Message]) -> Scale | None:
    known = [piece.scale for piece in pieces if piece.scale is not None]
    all_values = [piece.values for piece in pieces]
    if not known:
        return None
    logs = [scale.log for scale in known if scale.log is not None]
    log = torch.cat(logs) if logs else None
    if all(scale.lost is None for scale in known):
        return Scale(log, None)
    lost = [
        values.new_zeros(values.shape[:2], dtype=torch.float64) if s.lost is None else s.lost
        for values, s in zip(all_values, known, strict=True)
    ]
    return Scale(log, torch.cat(lost))


def _order(request: Request) -> nn.Module:
    return nn.Identity() if request.order is None else Rows(request.order)
