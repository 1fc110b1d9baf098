"""What all steps of a compiled circuit have in common: messages, and who reads which rows.

Every step can run in two domains: scaled values (fast), or logs (any range; float64). The flows
that backward delivers are the same in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from distpc.circuits.evidence import Evidence
from distpc.circuits.rows import Rows
from distpc.circuits.schedule import Fanout, Request, StepPlan, SumPlan


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
        bank: nn.Module | None,
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
