"""Discretised logistic units over 0 .. C - 1, trained by gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from distpc.circuits.inputs import TableBank

MAX_LOG_SCALE = 20.0
"""Log-scales are read within this bound: exp of it, and its square, are safe in float32."""

INITIAL_LOG_SCALE = -1.4
"""A quarter of half the range: neighbouring units overlap."""


class LogisticBank(TableBank):
    """Tables of discretised logistic units.

    The range 0 .. C - 1 is put on [-1, 1]; with half a bin h = 1 / (C - 1) and the logistic
    function sigma, P(x) = sigma((x + h - mean) / scale) - sigma((x - h - mean) / scale), where the
    first and the last bin are open (Salimans et al., PixelCNN++, 2017). No exponential family, so
    there are no statistics: mean and log-scale follow the loss's gradient. Every category has a
    finite log-probability whatever the parameters; a pseudocount adds nothing to that and is not
    used.

    Attributes:
        statistics: the parameters, shape (T, 2, K): mean and log-scale on [-1, 1].
    """

    learns_by = "gradient"

    def __init__(self, sizes: Sequence[int], num_units: int) -> None:
        super().__init__(sizes, num_units)
        self.statistics = nn.Parameter(torch.empty(len(sizes), 2, num_units, device="meta"))

    def log_tables(self, tables: slice, size: int, dtype: torch.dtype) -> Tensor:
        mean, log_scale = self.statistics[tables].to(dtype).unsqueeze(2).unbind(1)
        return log_bins(mean, log_scale, size)

    def statistics_of(self, table: int) -> Tensor:
        """Mean and log-scale on [-1, 1], (K, 2)."""
        return self.statistics.detach()[table].T

    def totals(self, values: Tensor) -> Tensor:
        raise TypeError("logistic units keep no statistics: they follow the loss's gradient")

    def pseudo_samples(self, pseudocount: float) -> Tensor:
        raise TypeError("logistic units keep no statistics: they follow the loss's gradient")

    def start_near_(self, table: int, shares: Tensor) -> None:
        """Means at the quantiles that they had of the range; scales as broad as the data are."""
        values = torch.linspace(-1.0, 1.0, len(shares)).to(shares)
        mean, log_scale = self.statistics[table]
        ends = shares.cumsum(0)
        quantiles = torch.searchsorted(ends, ((mean + 1.0) / 2.0).to(ends) * ends[-1])
        mean.copy_(values[quantiles.clamp_max(len(shares) - 1)])
        deviation = ((values - values @ shares).square() @ shares).sqrt()
        # Of a constant the width of a bin; of a uniform variable, 1 / sqrt(3), the scale stays.
        deviation = deviation.clamp_min(1.0 / len(shares))
        log_scale.add_(torch.log(deviation * math.sqrt(3.0)).to(log_scale))

    def rescale_(self, uses: Sequence[Tensor]) -> None:
        pass

    def set_smoothing(self, pseudocount: float, num_samples: int) -> None:
        pass

    def draw(self, noise: float, generator: torch.Generator) -> Tensor:
        """Means spread evenly over the range, in random order (noise 0: all in the middle)."""
        num_tables, _, num_units = self.statistics.shape
        order = torch.rand(
            (num_tables, num_units), generator=generator, device=generator.device
        ).argsort(-1)
        means = ((2.0 * order + 1.0) / num_units - 1.0) * min(noise, 1.0)
        scales = torch.full_like(means, INITIAL_LOG_SCALE)
        return torch.stack([means, scales], dim=1)


def log_bins(mean: Tensor, log_scale: Tensor, size: int) -> Tensor:
    """Log-probabilities of the bins.

    Args:
        mean, log_scale: (T, 1, K), of the range [-1, 1].
        size: C.

    Returns:
        (T, C, K). No difference is taken that could cancel: with edges a < b,
        sigma(b) - sigma(a) = sigma(b) * sigma(-a) * (1 - exp(a - b)).
    """
    log_scale = log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
    if size == 1:
        return 0.0 * mean
    half = 1.0 / (size - 1)
    numbers = torch.arange(size - 1, dtype=mean.dtype, device=mean.device)
    inner_edges = (2.0 * numbers + 1.0) * half - 1.0
    precision = torch.exp(-log_scale)
    z = (inner_edges.unsqueeze(1) - mean) * precision
    below, above = logsigmoid(z), logsigmoid(-z)
    inside = torch.log(-torch.expm1(-2.0 * half * precision))
    middle = below[:, 1:] + above[:, :-1] + inside
    return torch.cat([below[:, :1], middle, above[:, -1:]], dim=1)
