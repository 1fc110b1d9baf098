"""The judge: a region-by-region evaluator in float64 and logs, slow and obviously right."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


def exact_weights(circuit: Circuit) -> dict[int, Tensor]:
    """Float64 weights of sums and inputs; tied regions share one tensor."""
    weights: dict[int, Tensor] = {}
    for plan in circuit.schedule.banks:
        for owners in plan.owners:
            shared = circuit.weights_of(owners[0], torch.float64).cpu().contiguous()
            weights.update(dict.fromkeys(owners, shared))
    return weights


def log_prob_exact(
    circuit: Circuit,
    x: Any,
    observed: Any = None,
    latents: Any = None,
    weights: dict[int, Tensor] | None = None,
) -> Tensor:
    """Log-likelihoods (B,) in nats, float64; differentiable in `weights`.

    Args:
        circuit: for its graph (and weights, where none are given).
        x, observed, latents: as for calling the circuit.
        weights: of each sum (K', K), categorical (K, C) and Gaussian region (K, 2).
    """
    weights = exact_weights(circuit) if weights is None else weights
    evidence = circuit.reader.read(x, latents, observed, "cpu")
    logs: list[Tensor] = []
    for index, region in enumerate(circuit.graph.regions):
        if region.kind == "input":
            assert region.variable is not None
            if circuit.num_categories[region.variable] is None:
                assert evidence.reals is not None
                log = _gaussian(weights[index], evidence.reals[region.variable])
            else:
                log = _categorical(weights[index], evidence.codes[region.variable])
        elif region.kind == "sum":
            mixed = torch.from_numpy(circuit.graph.mixed_units(index))
            log = log_sum_exp(weights[index].log() + logs[region.children[0]][:, mixed])
        elif region.kind == "product":
            log = torch.stack([logs[child] for child in region.children]).sum(0)
        elif region.kind == "kronecker":
            left, right = (logs[child] for child in region.children)
            log = (left.unsqueeze(2) + right.unsqueeze(1)).flatten(1)
        else:
            log = torch.cat([logs[child] for child in region.children], dim=-1)
        if region.latent is not None and evidence.latents is not None:
            value = evidence.latents[region.latent].unsqueeze(-1)
            allowed = (value < 0) | (value == torch.arange(region.num_units))
            log = torch.where(allowed, log, -torch.inf)
        logs.append(log)
    return logs[-1][:, 0]


def log_sum_exp(terms: Tensor) -> Tensor:
    """Over the last axis; -inf with gradient 0, not NaN, where all terms are -inf."""
    top = terms.detach().amax(-1, keepdim=True)
    top = torch.where(top.isneginf(), 0.0, top)
    total = (terms - top).exp().sum(-1)
    is_zero = total == 0
    return torch.where(is_zero, -torch.inf, torch.where(is_zero, 1.0, total).log() + top[..., 0])


def _categorical(weights: Tensor, codes: Tensor) -> Tensor:
    """(K, C), (B,) -> (B, K); log 1 where missing."""
    looked_up = weights.log().T[codes.clamp_min(0)]
    return torch.where(codes.unsqueeze(-1) < 0, 0.0, looked_up)


def _gaussian(weights: Tensor, values: Tensor) -> Tensor:
    mean, variance = weights[:, 0], weights[:, 1]
    square = (values.double().nan_to_num().unsqueeze(-1) - mean).square() / variance
    logs = -0.5 * (square + variance.log() + math.log(2 * math.pi))
    return torch.where(values.isnan().unsqueeze(-1), 0.0, logs)


def enumerate_worlds(num_categories: tuple[int | None, ...]) -> Tensor:
    """Every assignment of categorical variables, (number of worlds, V)."""
    return torch.tensor(list(itertools.product(*(range(c or 1) for c in num_categories))))
