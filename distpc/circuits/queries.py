"""Exact queries: likelihoods, conditionals, posteriors of latents, expected uses of units.

Posterior probabilities of units are flows, so one backward pass answers for all variables (and
all latents) at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpc.circuits.evidence import Evidence
from distpc.circuits.input_steps import TableStep
from distpc.circuits.inputs import TableBank
from distpc.errors import EvidenceError

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit


@torch.no_grad()
def log_prob(
    circuit: Circuit, x: Any, observed: Any = None, latents: Any = None, batch_size: int = 1024
) -> Tensor:
    """Log-likelihoods (B,) in nats, float32, computed in batches without gradients."""
    parts = []
    for _, evidence in circuit.reader.batches(x, latents, observed, batch_size, circuit.device):
        parts.append(circuit(evidence))
    return torch.cat(parts) if parts else torch.zeros(0)


def flows(circuit: Circuit, evidence: Evidence) -> tuple[Tensor, list[Tensor]]:
    """Log-likelihoods (B,), and for each step the posterior use of its units (E, B, K)."""
    with torch.enable_grad():
        evaluation = circuit.evaluate(evidence, keep=True)
        scaled = evaluation.scaled.outputs
        logs = [] if evaluation.logs is None else evaluation.logs.outputs
        grads = torch.autograd.grad(
            evaluation.log_prob.sum(), [*scaled, *logs], allow_unused=True, materialize_grads=True
        )
    result = [grad.contiguous() for grad in grads[: len(scaled)]]
    if evaluation.logs is not None:
        for flow, extra in zip(result, grads[len(scaled) :], strict=True):
            flow.index_add_(1, evaluation.again, extra.to(flow.dtype))
    return evaluation.log_prob.detach(), result


def uses(circuit: Circuit) -> list[Tensor]:
    """For each region (num_units,) how often a sample is expected to use each of its units."""
    _, step_flows = flows(circuit, circuit.reader.missing(1, circuit.device))
    totals = [torch.zeros(r.num_units, device=circuit.device) for r in circuit.graph.regions]
    for step, flow in zip(circuit.step_list, step_flows, strict=True):
        for row, region in enumerate(step.regions):
            totals[region] += flow[row, 0]
            # Inputs inside a product of inputs have no message of their own.
            bag = getattr(step, "bags", {row: ()})[row]
            for child in bag if region not in bag else ():
                totals[child] += flow[row, 0]
    return totals


def conditional(
    circuit: Circuit, x: Any, observed: Any, variables: Sequence[int], batch_size: int = 256
) -> Tensor:
    """Distribution of each variable given the evidence.

    Args:
        circuit: the model.
        x: (B, V) values; those not observed are ignored.
        observed: bool (V,) or (B, V).
        variables: categorical variables to answer for.

    Returns:
        (B, len(variables), C) float32, C the largest number of categories among them; 0 beyond a
        variable's own categories. A variable that is observed has probability 1 at its value.

    Raises:
        EvidenceError: evidence of probability 0, or a variable that is real or unknown.
    """
    sizes = [_num_categories(circuit, variable) for variable in variables]
    parts = []
    for evidence, start in _batches(circuit, x, observed, batch_size):
        log_probs, step_flows = flows(circuit, evidence)
        refuse_impossible(log_probs, start)
        parts.append(_conditional(circuit, evidence, step_flows, variables, sizes))
    return torch.cat(parts) if parts else torch.zeros(0, len(variables), max(sizes, default=0))


def _conditional(
    circuit: Circuit,
    evidence: Evidence,
    step_flows: list[Tensor],
    variables: Sequence[int],
    sizes: list[int],
) -> Tensor:
    readers = _readers(circuit)
    weights = {
        number: bank.weights()
        for number, bank in enumerate(circuit.bank_list)
        if isinstance(bank, TableBank)
    }
    batch = evidence.codes.shape[1]
    result = torch.zeros(batch, len(variables), max(sizes, default=0), device=circuit.device)
    for position, (variable, size) in enumerate(zip(variables, sizes, strict=True)):
        total = result[:, position, :size]
        for step, row, bank, table in readers[variable]:
            total += step_flows[step][row] @ weights[bank][table].T
        # Rounding in a long backward pass leaves the sum a little off one.
        total /= total.sum(-1, keepdim=True)
        codes = evidence.codes[variable]
        is_observed = (codes >= 0).nonzero()[:, 0]
        total[is_observed] = 0.0
        total[is_observed, codes[is_observed]] = 1.0
    return result


def _readers(circuit: Circuit) -> dict[int, list[tuple[int, int, int, slice]]]:
    """For each variable the (step, row, bank, rows of the table) that look it up."""
    readers: dict[int, list[tuple[int, int, int, slice]]] = defaultdict(list)
    for number, step in enumerate(circuit.step_list):
        if not isinstance(step, TableStep):
            continue
        for row, bag in enumerate(step.bags):
            for child in bag:
                variable = circuit.graph.regions[child].variable
                bank, table = circuit.bank_of(child)
                assert variable is not None and isinstance(bank, TableBank)
                readers[variable].append((number, row, step.bank, bank.table(table)))
    return readers


def posterior(circuit: Circuit, x: Any, observed: Any = None, batch_size: int = 256) -> Tensor:
    """Posterior of latent variables given the evidence.

    Returns:
        (B, Z, K) float32, K the largest number of values; 0 beyond a latent's own values.

    Raises:
        EvidenceError: evidence of probability 0.
    """
    parts = []
    width = max(circuit.latent_sizes, default=0)
    for evidence, start in _batches(circuit, x, observed, batch_size):
        log_probs, step_flows = flows(circuit, evidence)
        refuse_impossible(log_probs, start)
        part = torch.zeros(len(log_probs), circuit.num_latents, width, device=circuit.device)
        for index, region in enumerate(circuit.graph.regions):
            place = circuit.schedule.places[index]
            if region.latent is not None and place is not None:
                part[:, region.latent, : region.num_units] += step_flows[place[0]][place[1]]
        parts.append(part)
    return torch.cat(parts) if parts else torch.zeros(0, circuit.num_latents, width)


def _batches(
    circuit: Circuit, x: Any, observed: Any, batch_size: int
) -> list[tuple[Evidence, int]]:
    batches = circuit.reader.batches(x, None, observed, batch_size, circuit.device)
    return [(evidence, start) for start, evidence in batches]


def _num_categories(circuit: Circuit, variable: int) -> int:
    known = 0 <= variable < circuit.num_variables
    size = circuit.num_categories[variable] if known else None
    if size is None:
        raise EvidenceError(
            "conditionals are tables over categories",
            where=f"variable {variable}",
            found="a real variable" if known else "no such variable",
            expected=f"a categorical variable among 0 .. {circuit.num_variables - 1}",
        )
    return size


def refuse_impossible(log_probs: Tensor, start: int) -> None:
    """Raise EvidenceError for evidence of probability 0; `start` is the batch's first row."""
    impossible = (~log_probs.isfinite()).nonzero()[:, 0]
    if len(impossible):
        raise EvidenceError(
            "the evidence has probability 0, nothing can be conditioned on it",
            where=f"rows {(impossible[:5] + start).tolist()} of x",
            found=f"{len(impossible)} such rows",
            fix="observe fewer variables, or train with a pseudocount",
        )
