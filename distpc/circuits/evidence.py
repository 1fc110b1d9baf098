"""What is observed: values, mask and latents, checked and laid out variable by variable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distpc.data.spec import MISSING
from distpc.errors import EvidenceError


@dataclass(frozen=True)
class Evidence:
    """A batch of observations.

    Attributes:
        codes: (V, B) int64 categories, -1 where missing (and for real variables).
        reals: (V, B) values of real variables, NaN where missing; None without real variables.
        latents: (Z, B) int64 values of latent variables, -1 where unobserved; or None.
        likelihoods: (V, B, C) float32 logs, soft evidence: how likely what was seen is given each
            category of a variable ("virtual evidence", Pearl 1988). Read by indicator inputs, in
            place of codes; None: the values themselves are observed.
    """

    codes: Tensor
    reals: Tensor | None
    latents: Tensor | None
    likelihoods: Tensor | None = None

    def select(self, samples: Tensor) -> Evidence:
        """The evidence of some samples (indices)."""
        return Evidence(
            self.codes[:, samples],
            None if self.reals is None else self.reals[:, samples],
            None if self.latents is None else self.latents[:, samples],
            None if self.likelihoods is None else self.likelihoods[:, samples],
        )

    def mask(self, latents: Tensor | None, units: range) -> Tensor | None:
        """Units that latent evidence leaves.

        Args:
            latents: (E,) the latent of each row, -1 for none; None where no row has one.
            units: 0 .. K - 1, or those of them that are wanted.

        Returns:
            (E, B, K) bool, or None where everything is left.
        """
        if latents is None or self.latents is None:
            return None
        values = self.latents[latents.clamp_min(0)]
        values = torch.where(latents.unsqueeze(1) < 0, MISSING, values).unsqueeze(-1)
        return (values < 0) | (
            values == torch.arange(units.start, units.stop, device=values.device)
        )


class EvidenceReader:
    """Checks evidence against a circuit's variables.

    Args:
        num_categories: of each variable; None for a real one.
        num_values: of each latent variable.
    """

    def __init__(self, num_categories: tuple[int | None, ...], num_values: tuple[int, ...]) -> None:
        self.num_categories = num_categories
        self.num_values = num_values
        self.is_real = torch.tensor([c is None for c in num_categories])
        self.limits = torch.tensor([c or 0 for c in num_categories])
        self.latent_limits = torch.tensor(num_values, dtype=torch.int64)

    def batches(
        self, x: Any, latents: Any, observed: Any, batch_size: int, device: Any = None
    ) -> Iterator[tuple[int, Evidence]]:
        """As `read`, batch after batch, each with the number of its first row.

        Raises:
            EvidenceError: a shape that does not fit as a whole, or what `read` refuses.
        """
        x = self._samples(x, None)
        observed = None if observed is None else self._observed(observed, x).t()
        latents = None if latents is None else self._latents(latents, len(x), None)
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            of_latents = None if latents is None else latents[rows]
            mask = None if observed is None else observed[rows]
            yield start, self.read(x[rows], of_latents, mask, device, first=start)

    def read(
        self,
        x: Any,
        latents: Any = None,
        observed: Any = None,
        device: Any = None,
        *,
        first: int = 0,
    ) -> Evidence:
        """Evidence from arrays.

        Args:
            x: (B, V) integers with -1, or floats with NaN, where missing; tensor or array.
            latents: (B, Z) integers, -1 where unobserved.
            observed: bool (V,) or (B, V); False sums the variable out.
            device: where the circuit's parameters are.
            first: number of the first row, for messages.

        Raises:
            EvidenceError: a shape, type or value that does not fit.
        """
        x = self._samples(x, device)
        observed = None if observed is None else self._observed(observed, x)
        codes, reals = self._values(x.t(), observed, first)
        self._check(codes, self.limits, "variable", "num_categories of the circuit", first)
        if latents is not None:
            latents = self._latents(latents, len(x), device).t().long().contiguous()
            self._check(latents, self.latent_limits, "latent", "values of the latent", first)
        return Evidence(codes, reals, latents)

    def read_soft(self, logs: Any, device: Any = None) -> Evidence:
        """Soft evidence on all variables, for circuits whose inputs are all indicators.

        Args:
            logs: (B, V, C) log-likelihoods of what was seen of each variable given each of its
                categories, up to a constant a sample; -inf rules a category out.
            device: where the circuit's parameters are.

        Raises:
            EvidenceError: another shape than the variables', or NaN or +inf.
        """
        logs = _tensor(logs, device)
        widths = set(self.num_categories)
        width = next(iter(widths)) if len(widths) == 1 else None
        shape = (len(self.num_categories), width)
        if width is None or tuple(logs.shape[1:]) != shape or not logs.is_floating_point():
            raise EvidenceError(
                "soft evidence has another shape or type than the circuit's variables",
                found=f"{logs.dtype} of shape {tuple(logs.shape)}",
                expected=f"logs of shape (batch, {shape[0]}, {width or 'categories'})",
            )
        if not bool((logs < torch.inf).all()):
            raise EvidenceError(
                "soft evidence is not finite from above",
                found="NaN or +inf",
                expected="log-likelihoods, -inf where impossible",
            )
        codes = torch.full((shape[0], len(logs)), MISSING, device=logs.device)
        return Evidence(codes, None, None, logs.float().transpose(0, 1).contiguous())

    def _samples(self, x: Any, device: Any) -> Tensor:
        x = _tensor(x, device)
        num_variables = len(self.num_categories)
        if x.dim() != 2 or x.shape[1] != num_variables or x.is_complex():
            raise EvidenceError(
                "x has another shape or type than the circuit's data",
                found=f"{x.dtype} of shape {tuple(x.shape)}",
                expected=f"real numbers of shape (batch, {num_variables})",
            )
        return x

    def missing(self, batch: int, device: Any = None) -> Evidence:
        """Evidence of nothing."""
        shape = (len(self.num_categories), batch)
        codes = torch.full(shape, MISSING, device=device)
        reals = torch.full(shape, torch.nan, device=device) if self.is_real.any() else None
        return Evidence(codes, reals, None)

    def _observed(self, observed: Any, x: Tensor) -> Tensor:
        observed = _tensor(observed, x.device)
        if observed.dtype != torch.bool or tuple(observed.shape) not in (
            (x.shape[1],),
            tuple(x.shape),
        ):
            raise EvidenceError(
                "the mask of observed variables does not fit x",
                found=f"{observed.dtype} of shape {tuple(observed.shape)}",
                expected=f"bool of shape ({x.shape[1]},) or {tuple(x.shape)}",
            )
        return observed.expand(x.shape).t()

    def _values(
        self, x: Tensor, observed: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor | None]:
        is_real = self.is_real.to(x.device).unsqueeze(1)
        any_real = bool(self.is_real.any())
        if not x.is_floating_point():
            if any_real:
                x = torch.where((x == MISSING) & ~is_real, torch.nan, x.double())
            else:
                codes = x.long()
                codes = codes if observed is None else torch.where(observed, codes, MISSING)
                return codes.contiguous(), None
        if observed is not None:
            x = torch.where(observed, x, torch.nan)
        if x.isinf().any():
            self._refuse(x.isinf(), x, "variable", "finite values, NaN where missing", first)
        codes = torch.where(x.isnan() | is_real, MISSING, x).long()
        fractions = ~is_real & ~x.isnan() & (codes != x)
        if fractions.any():
            self._refuse(fractions, x, "variable", "whole numbers, NaN where missing", first)
        return codes, torch.where(is_real, x, torch.nan) if any_real else None

    def _latents(self, latents: Any, batch: int, device: Any) -> Tensor:
        latents = _tensor(latents, device)
        if tuple(latents.shape) != (batch, len(self.num_values)) or latents.is_floating_point():
            raise EvidenceError(
                "latents do not fit x and the circuit",
                found=f"{latents.dtype} of shape {tuple(latents.shape)}",
                expected=f"integers of shape ({batch}, {len(self.num_values)})",
            )
        return latents

    def _check(self, codes: Tensor, limits: Tensor, what: str, source: str, first: int) -> None:
        limits = limits.to(codes.device)
        wrong = (codes < MISSING) | ((codes >= limits.unsqueeze(1)) & (codes != MISSING))
        if wrong.any():
            row = int(wrong.any(1).nonzero()[0, 0])
            expected = f"0 .. {int(limits[row]) - 1}, or -1 where missing ({source})"
            self._refuse(wrong, codes, what, expected, first)

    def _refuse(self, wrong: Tensor, values: Tensor, what: str, expected: str, first: int) -> None:
        row, sample = (int(i) for i in wrong.nonzero()[0])
        raise EvidenceError(
            f"a value does not fit its {what}",
            where=f"{what} {row}, row {sample + first} of x",
            found=values[row, sample].item(),
            expected=expected,
        )


def _tensor(value: Any, device: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype in (np.uint16, np.uint32, np.uint64):
        value = value.astype(np.int64)
    if isinstance(value, np.ndarray) and (min(value.strides, default=0) < 0):
        value = value.copy()
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvidenceError(
            "evidence is no array of numbers", found=f"{type(value).__name__}: {error}"
        ) from error
