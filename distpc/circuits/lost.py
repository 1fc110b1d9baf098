"""What scaled values lose to underflow, bounded row by row: when a sample needs the log domain.

The scale of a message has shape (E, B, 2), float64: `scale[..., 0]` is its log-scale, and
`scale[..., 1]` is a bound `lost` on what its units lack. With u the computed and u* the exact
values, both on the scale of the message,

    u <= u* <= (1 + rounding) * u + lost                                        for every unit.

A lost unit need not be small at the root: where sums do not mix, it may be the only one left a few
levels higher up. So the bound is carried, from the leaves to the root, which compares it with the
likelihood. Its rules, with all u at most 1 and the largest unit of what a sum reads equal to 1:

* an entry of a product, an input or a concat below FLOAT_FLOOR may lack FLOAT_FLOOR. (Factors are
  at most 1, so that an intermediate product that underflows is below it as well.)
* product: prod(u + lost) - prod(u) <= sum of the lost, to first order; then both are divided by
  the top. Beyond LARGE, where higher orders count, a bound can only grow on its way up.
* sum: rows sum to 1, so a sum lacks at most what its child lacks. A sum whose smallest weight is w
  has outputs of at least w: what is below TRUST * w is below TRUST relative to *each* output, and
  is forgotten. It is why smoothed circuits lose nothing that matters, at any depth.
* the terms of a sum may underflow too: with weights below MIXING a small output may lack them.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_FLOOR = 1.2e-38
"""Smallest normal float32: an entry below it may stand for anything smaller."""

TRUST = 1e-7
"""Relative loss that is no more than rounding."""

LARGE = 0.1
"""A bound above this is no first-order quantity."""

MIXING = 1e-20
"""Outputs of a sum with larger weights only are far above all that underflows in it."""

TINY = 1e-34
"""Sum units below this carry no flow, so they count as lost; it covers 8000 underflowing terms."""

MAX_NATS = 700.0
"""exp() of more overflows float64."""


def underflow(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """What entries of (..., K) with maximum about 1 may lack, (...), float64.

    Entries outside of the mask are 0 exactly.
    """
    if mask is not None:
        values = torch.where(mask, values, 1.0)
    return (values.amin(-1) < FLOAT_FLOOR).double().mul_(FLOAT_FLOOR)


def new_scale(log_scale: Tensor, lost: Tensor) -> Tensor:
    """(E, B, 2) of its two halves."""
    return torch.stack([log_scale.double(), lost], dim=-1)


def divide_(scale: Tensor, log_top: Tensor) -> Tensor:
    """The bound after a message was divided by exp(log_top) (E, B); its log-scale is left."""
    # A bound that is 0 stays 0, whatever the top; any other becomes large enough.
    scale[..., 1] *= (-log_top).clamp_max(MAX_NATS).exp_()
    return scale


def mix(scale: Tensor, smallest: Tensor, out: Tensor) -> Tensor:
    """The scale of a sum.

    Args:
        scale: (E, B, 2) of its child.
        smallest: (T,) least weight of each table, E / T consecutive rows each.
        out: (E, B, K') the sum's values.
    """
    least = smallest.double().repeat_interleave(len(scale) // len(smallest)).unsqueeze(-1)
    log_scale, lost = scale.unbind(-1)
    lost = torch.where(lost <= TRUST * least, 0.0, lost)
    # Looked up only where that costs no synchronisation with a device.
    if out.device.type != "cpu" or bool((smallest < MIXING).any()):
        is_small = (out.amin(-1) < TINY / TRUST) & (least < MIXING)
        lost = lost + is_small.double().mul_(TINY)
    return torch.stack([log_scale, lost], dim=-1)


def concat_lost(scale: Tensor, common: Tensor) -> Tensor:
    """The bound (E, B) of a group that is brought to the common log-scale (E, B)."""
    log_scale, lost = scale.unbind(-1)
    # Here alone a bound may shrink, which one beyond the first order must not.
    lost = torch.where(lost > LARGE, torch.inf, lost)
    return lost * (log_scale - common).clamp_(-MAX_NATS, MAX_NATS).exp_()


def is_untrustworthy(scale: Tensor, values: Tensor) -> Tensor:
    """Whether the values (B,) of the root may lack too much, given its scale (B, 2)."""
    # Negated, so that NaN counts.
    return ~(scale[..., 1] <= TRUST * values)
