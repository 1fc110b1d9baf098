"""Marginal MAP, approximately: the best of a few candidates, each scored exactly.

Maximising over some variables while summing over the others (and the latents) is NP-hard in
circuits, so what is found is a lower bound on the maximum, with no promise of how close.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distpc.circuits.queries.conditional import conditional_blocks
from distpc.circuits.queries.mpe import mpe
from distpc.circuits.queries.sampling import sample_blocks
from distpc.data.spec import MISSING
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


class ApproximateMarginalMap(NamedTuple):
    """The best candidate of each row: an approximation from below.

    Attributes:
        x: (B, V) the evidence and the values of the queried variables; -1 or NaN elsewhere.
        log_prob: (B,) float32, log p(queried values, evidence) in nats: exact for these values,
            a lower bound on the maximum.
        num_candidates: that were compared for each row.
    """

    x: Tensor
    log_prob: Tensor
    num_candidates: int


@torch.no_grad()
def marginal_map_approximate(
    circuit: Circuit,
    x: Any,
    observed: Any,
    variables: Sequence[int],
    num_candidates: int = 8,
    seed: int = 0,
    num_sweeps: int = 0,
) -> ApproximateMarginalMap:
    """Good values of some variables given the evidence, all the rest summed out. Approximate.

    The candidates of a row are the values of its MPE and `num_candidates - 1` conditional samples;
    the one of the highest exact marginal likelihood is kept. Coordinate ascent then sets one
    variable after another to its most probable category given all the others.

    Args:
        circuit: the model.
        x: (B, V) values; those not observed are ignored.
        observed: bool (V,) or (B, V), or None.
        variables: those to find values for; observed ones keep theirs.
        num_candidates: compared for each row; more is never worse.
        seed: of the samples.
        num_sweeps: of coordinate ascent over the categorical ones; a sweep takes
            `len(variables)` conditionals of all rows.

    Raises:
        EvidenceError: evidence of probability 0, no variables, an unknown one, or no such number
            of candidates or sweeps.
    """
    _check_counts(circuit, variables, num_candidates, num_sweeps)
    rows = _rows(circuit, x, observed)
    asked = torch.zeros(circuit.num_variables, dtype=torch.bool, device=rows.device)
    asked[list(variables)] = True
    wanted = asked & (rows.isnan() if rows.is_floating_point() else rows < 0)
    best = torch.where(wanted, mpe(circuit, rows).x.to(rows.dtype), rows)
    scores = circuit.log_prob(best)
    if num_candidates > 1:
        for start, samples in sample_blocks(circuit, num_candidates - 1, seed, rows, None):
            part = slice(start, start + len(samples))
            for candidate in samples.unbind(1):
                trial = torch.where(wanted[part], candidate.to(rows.dtype), rows[part])
                score = circuit.log_prob(trial)
                better = score > scores[part]
                best[part] = torch.where(better.unsqueeze(1), trial, best[part])
                scores[part] = torch.where(better, score, scores[part])
    for _ in range(num_sweeps):
        for variable in variables:
            if circuit.num_categories[variable] is not None:
                _improve(circuit, best, wanted[:, variable], variable)
    if num_sweeps:
        scores = circuit.log_prob(best)
    return ApproximateMarginalMap(best, scores, num_candidates)


def _improve(circuit: Circuit, best: Tensor, wanted: Tensor, variable: int) -> None:
    """Set one variable of `best`, in the rows where it is wanted, to the best of its values."""
    trial = best.clone()
    trial[wanted, variable] = torch.nan if best.is_floating_point() else MISSING
    for start, block in conditional_blocks(circuit, trial, None, [variable]):
        part = slice(start, start + len(block))
        shares = block[:, 0]
        now = best[part, variable]
        # Rounding must not undo what was chosen.
        gain = shares.amax(-1) > 1.00001 * shares.gather(1, now.long().unsqueeze(1))[:, 0]
        change = wanted[part] & gain
        best[part, variable] = torch.where(change, shares.argmax(-1).to(best.dtype), now)


def _rows(circuit: Circuit, x: Any, observed: Any) -> Tensor:
    """(B, V) checked values of what is observed, -1 or NaN elsewhere."""
    evidence = circuit.reader.read(x, None, observed, circuit.device)
    if evidence.reals is None:
        return evidence.codes.t().contiguous()
    codes = torch.where(evidence.codes < 0, torch.nan, evidence.codes.to(evidence.reals.dtype))
    is_real = circuit.reader.is_real.to(codes.device).unsqueeze(1)
    return torch.where(is_real, evidence.reals, codes).t().contiguous()


def _check_counts(
    circuit: Circuit, variables: Sequence[int], num_candidates: int, num_sweeps: int
) -> None:
    unknown = [v for v in variables if not 0 <= v < circuit.num_variables]
    if unknown or not len(variables):
        raise EvidenceError(
            "values are found for known variables",
            where="variables",
            found=f"unknown: {unknown}" if unknown else "none",
            expected=f"some of 0 .. {circuit.num_variables - 1}",
        )
    for name, count, least in (
        ("num_candidates", num_candidates, 1),
        ("num_sweeps", num_sweeps, 0),
    ):
        if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
            raise EvidenceError(
                "no such number", where=name, found=count, expected=f"{least}, {least + 1}, ..."
            )
