"""Gaussian input units, stored as running moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distpc.circuits.bank import Bank
from distpc.circuits.lost import new_scale, underflow

VARIANCE_FLOOR = 1e-4
"""Least variance of a Gaussian unit, in units of the variable's squared spread."""


class GaussianBank(Bank):
    """Tables of Gaussian units as running moments.

    A pseudocount is that many imaginary uses that saw mean 0 and variance 1 (of standardised
    values). The variance has a floor in any case, so that a value seen once has a finite density.

    Values are standardised first, z = (x - centre) / spread, because raw float32 moments lose
    small variances of variables far from zero.

    Attributes:
        statistics: S, shape (T, 3, K): uses, sum of z and sum of z^2 per sample.
        centre, spread: (T,), in the variable's units.
        pseudocount: weight of one standard normal pseudo-observation, over samples.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, num_tables: int, num_units: int) -> None:
        super().__init__()
        self.statistics = nn.Parameter(torch.empty(num_tables, 3, num_units, device="meta"))
        self.register_buffer("centre", torch.zeros(num_tables, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(num_tables, dtype=torch.float64))
        self.pseudocount = 0.0

    def forward(
        self, z: Tensor, tables: Tensor, in_logs: bool = False, mask: Tensor | None = None
    ) -> Tensor:
        """Log densities (E, B, K) of standardised values z (E, B), NaN = missing (log 1)."""
        return GaussianFunction.apply(self.statistics, self, z, tables, mask, in_logs)

    def moments(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (T, K) of standardised values; 0 and 1 of units never used."""
        uses, first, second = statistics.unbind(1)
        uses = uses + self.pseudocount
        is_empty = uses < torch.finfo(torch.float32).tiny
        uses = torch.where(is_empty, 1.0, uses)
        mean = torch.where(is_empty, 0.0, first) / uses
        second = torch.where(is_empty, 1.0, second + self.pseudocount)
        variance = second / uses - mean.square()
        return mean, variance.clamp_min(VARIANCE_FLOOR)

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        """A pseudocount in samples a unit."""
        self.pseudocount = pseudocount / num_samples

    def statistics_of(self, table: int) -> Tensor:
        """Uses, sum of z and sum of z^2, (K, 3)."""
        return self.statistics.detach()[table].T

    def weights_of(self, table: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mean and variance in the variable's units, (K, 2)."""
        mean, variance = self.moments(self.statistics.detach().to(dtype))
        spread = self.spread[table]
        return torch.stack(
            [mean[table] * spread + self.centre[table], variance[table] * spread**2], dim=-1
        ).to(dtype)

    def totals(self, values: Tensor) -> Tensor:
        return values[:, :1]

    def pseudo_samples(self, pseudocount: float) -> Tensor:
        # Observations with mean 0 and variance 1.
        return pseudocount * torch.tensor([1.0, 0.0, 1.0], device=self.statistics.device)[:, None]

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        moments = self.statistics / self.statistics[:, :1].clamp_min(1e-30)
        self.statistics.copy_(moments * torch.stack(list(uses)).unsqueeze(1))

    def draw(self, noise: float, generator: torch.Generator) -> Tensor:
        """Means spread by `noise` standard deviations, variance 1."""
        num_tables, _, num_units = self.statistics.shape
        mean = noise * torch.randn(
            (num_tables, num_units), generator=generator, device=generator.device
        )
        moments = [torch.ones_like(mean), mean, 1.0 + mean.square()]
        return torch.stack(moments, dim=1)


class GaussianFunction(torch.autograd.Function):
    """Log density of Gaussian units; the flow goes to the sufficient statistics (1, z, z^2)."""

    @staticmethod
    def forward(
        ctx: Any,
        statistics: Tensor,
        bank: GaussianBank,
        z: Tensor,
        tables: Tensor,
        mask: Tensor | None,
        in_logs: bool,
    ) -> Tensor:
        dtype = torch.float64 if in_logs else statistics.dtype
        mean, variance = (m[tables].unsqueeze(1) for m in bank.moments(statistics.to(dtype)))
        ctx.save_for_backward(z, tables)
        ctx.like = statistics.shape, statistics.dtype
        logs = (z.to(dtype).unsqueeze(-1) - mean).square_().div_(-2.0 * variance)
        logs -= 0.5 * variance.log() + 0.5 * math.log(2 * math.pi)
        logs -= bank.spread[tables].log().to(dtype).view(-1, 1, 1)
        logs = torch.where(z.isnan().unsqueeze(-1), 0.0, logs)
        return logs if mask is None else torch.where(mask, logs, -torch.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        z, tables = ctx.saved_tensors
        shape, dtype = ctx.like
        seen = torch.where(z.isnan(), 0.0, 1.0)
        z = torch.where(z.isnan(), 0.0, z)
        powers = torch.stack([seen, z, z.square()], dim=1).to(flow.dtype)
        flow_rows = torch.matmul(powers, flow).to(dtype)
        flow_s = torch.zeros(shape, dtype=dtype, device=flow.device)
        return flow_s.index_add_(0, tables, flow_rows), None, None, None, None, None


class ScaleLogsFunction(torch.autograd.Function):
    """Logs -> values with maximum 1 and scale (E, B, 2); the flow stays what it is."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor) -> tuple[Tensor, Tensor]:
        top = logs.amax(-1)
        values = (logs - torch.where(top.isneginf(), 0.0, top).unsqueeze(-1)).exp_()
        scale = new_scale(top, underflow(values))
        ctx.mark_non_differentiable(scale)
        return values, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flow: Tensor, *_: Any) -> Tensor:
        return flow
