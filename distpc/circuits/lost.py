"""The scale of a message, and what scaled values lose to underflow: when a sample needs logs.

With u the computed and u* the exact values of a message, both on its own scale, `lost` bounds

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

Nothing is lost almost always. On a CPU, where looking costs no synchronisation, `lost` is then
None and none of this is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Scale(NamedTuple):
    """The likelihood of unit k is values[e, b, k] * exp(log[e, b]).

    Attributes:
        log: (E, B) float64; None where the pass adds up log-scales sample by sample.
        lost: (E, B) float64; None: nothing.
    """

    log: Tensor | None
    lost: Tensor | None

    @classmethod
    def of(cls, halves: Tensor) -> Scale:
        """From both halves side by side, (E, B, 2)."""
        log, lost = halves.unbind(-1)
        return cls(log, lost if may_hold(lost, torch.any) else None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Scale:
        """Both halves rearranged by rows."""
        return Scale(
            None if self.log is None else change(self.log),
            None if self.lost is None else change(self.lost),
        )

    def divided(self, log_top: Tensor) -> Scale:
        """The scale of values that were divided by exp(log_top) (E, B)."""
        log = log_top if self.log is None else self.log + log_top
        if self.lost is None:
            return Scale(log, None)
        # A bound that is 0 stays 0, whatever the top; any other becomes large enough.
        return Scale(log, self.lost * (-log_top).clamp_max(MAX_NATS).exp_())

    def losing(self, more: Tensor | None) -> Scale:
        """With `more` (E, B) lost."""
        if more is None:
            return self
        return Scale(self.log, more if self.lost is None else self.lost + more)


def may_hold(condition: Tensor, reduce: Callable[[Tensor], Tensor] = torch.any) -> bool:
    """Whether a condition holds somewhere; "it may" where looking would stall a device."""
    return condition.device.type != "cpu" or bool(reduce(condition))


def is_above(values: Tensor, floor: float) -> bool:
    """Whether no value is below a floor, NaN counting as below; never where looking would stall."""
    if values.device.type != "cpu":
        return False
    return not values.numel() or float(values.amin()) >= floor


def underflow(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """What entries of (..., K) with maximum about 1 may lack, (...), float64.

    Entries outside of the mask are 0 exactly.
    """
    if mask is not None:
        values = torch.where(mask, values, 1.0)
    return (values.amin(-1) < FLOAT_FLOOR).double().mul_(FLOAT_FLOOR)


def some_underflow(values: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """As `underflow`, None where nothing is lost."""
    if is_above(values, FLOAT_FLOOR):
        return None
    lost = underflow(values, mask)
    return lost if may_hold(lost) else None


def new_scale(log_scale: Tensor, lost: Tensor) -> Tensor:
    """Both halves of a scale as one tensor (E, B, 2): what an autograd function can give."""
    return torch.stack([log_scale.double(), lost], dim=-1)


def mix(scale: Scale, smallest: Tensor | None, out: Tensor, look: Callable[[], Tensor]) -> Scale:
    """The scale of a sum.

    Args:
        scale: of its child.
        smallest: (T,) a lower bound of each table's weights, E / T consecutive rows each; None
            where they are known to be above MIXING.
        out: (E, B, K') the sum's values.
        look: gives what `smallest` does not say.
    """
    mixes_little = smallest is not None and may_hold(smallest < MIXING)
    if scale.lost is None and not mixes_little:
        return scale
    log, lost = scale
    smallest = look() if smallest is None else smallest
    least = smallest.double().repeat_interleave(len(out) // len(smallest)).unsqueeze(-1)
    if lost is not None:
        lost = torch.where(lost <= TRUST * least, 0.0, lost)
        lost = lost if may_hold(lost) else None
    if not mixes_little:
        return Scale(log, lost)
    is_small = (out.amin(-1) < TINY / TRUST) & (least < MIXING)
    return Scale(log, lost).losing(is_small.double().mul_(TINY) if may_hold(is_small) else None)


def concat_lost(scale: Scale, common: Tensor) -> Tensor:
    """The bound (E, B) of a group that is brought to the common log-scale (E, B)."""
    if scale.lost is None:
        return torch.zeros_like(common)
    assert scale.log is not None
    # Here alone a bound may shrink, which one beyond the first order must not.
    lost = torch.where(scale.lost > LARGE, torch.inf, scale.lost)
    return lost * (scale.log - common).clamp_(-MAX_NATS, MAX_NATS).exp_()


def is_untrustworthy(lost: Tensor, values: Tensor) -> Tensor:
    """Whether the values (B,) of the root may lack too much, given its bound (B,)."""
    # Negated, so that NaN counts.
    return ~(lost <= TRUST * values)
