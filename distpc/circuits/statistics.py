"""Parameters are expected statistics; weights are read out of them.

A circuit stores, for each row n of weights, the running mean S[n, c] >= 0 of the *flow* through
edge (n, c) per training sample. A row's sum is the expected number of uses of unit n per sample
(below 1 for a unit that few samples visit, up to T for one that is tied over T positions). The
weights are read out where whole rows are present, inside forward:

    theta[n, c] = (S[n, c] + eps) / (sum_c S[n, c] + eps * fan_in)

The backward pass hands the flow F[n, c] = theta[n, c] * d log p / d theta[n, c] back as the
"gradient" of S, and the optimizer's rule is element-wise:

    S <- (1 - step) * S + step * mean flow  =  (1 - step) * S - step * S.grad

for the loss -mean log p. This is online EM (Cappe & Moulines, 2009). Being element-wise it is
exact on any flat shard of S, so that ZeRO may partition S without knowing rows; smoothing is part
of the read-out, not of the update. A step of 1 is one step of EM on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masked(NamedTuple):
    """Smoothing where some edges are structural zeros.

    Attributes:
        smoothing: eps of the other edges.
        mask: bool, shaped as the statistics; False where a weight is 0 whatever the statistics.
    """

    smoothing: float
    mask: Tensor


def read_out(
    statistics: Tensor, smoothing: float | Masked, dim: int = -1, out: Tensor | None = None
) -> Tensor:
    """Normalised weights of rows that lie along `dim`; a row without any mass is uniform.

    Args:
        statistics: S, of any shape.
        smoothing: eps, added to each entry (in uses per sample); with a mask to those inside only.
        dim: the axis over which weights sum to one.
        out: where to write the weights.
    """
    if isinstance(smoothing, Masked):
        inside = smoothing.mask.to(statistics.dtype)
        weights = torch.add(statistics, smoothing.smoothing, out=out).mul_(inside)
        is_empty = weights.sum(dim, keepdim=True) <= 0
        weights = torch.where(is_empty, inside, weights, out=out)
        return weights.div_(weights.sum(dim, keepdim=True))
    if smoothing > 0:
        # No row is empty; a product is faster than a quotient.
        scale = row_scale(statistics, smoothing, dim)
        return torch.add(statistics, smoothing, out=out).mul_(scale)
    fan_in = statistics.shape[dim]
    total = statistics.sum(dim, keepdim=True)
    is_empty = total <= 0
    # As tensors: `where` of two Python numbers would round them to float32.
    uniform, floor = (total.new_full((), value) for value in (1.0 / fan_in, smoothing))
    floor = torch.where(is_empty, uniform, floor)
    weights = torch.add(statistics, floor, out=out)
    return weights.div_(torch.where(is_empty, 1.0, total))


def row_scale(statistics: Tensor, smoothing: float, dim: int = -1) -> Tensor:
    """1 / (sum_c S[n, c] + eps * fan_in), what (S + eps) is multiplied by; eps > 0."""
    total = statistics.sum(dim, keepdim=True).add_(smoothing * statistics.shape[dim])
    return total.reciprocal_()


def random_statistics(shape: tuple[int, ...], noise: float, generator: torch.Generator) -> Tensor:
    """Positive entries exp(-2 * noise * u), u uniform on [0, 1): rows are random, not peaked."""
    values = torch.rand(shape, generator=generator, device=generator.device)
    return values.mul_(-2.0 * noise).exp_()
