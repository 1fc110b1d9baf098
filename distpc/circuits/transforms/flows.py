"""Flows over a data set: how often each unit and each edge is used, in one pass over batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distpc.circuits.circuit import Circuit, Evaluation
from distpc.circuits.evidence import Evidence


@dataclass
class Flows:
    """Totals over samples, float64.

    Attributes:
        nodes: for each region (num_units,) posterior uses of its units.
        edges: for each bank, in the layout of its statistics, the flows that EM would count; None
            where a bank has none or learns by gradients.
        num_samples: samples seen, impossible ones included.
        impossible: samples of likelihood 0; they have no flow.
        log_prob: sum of the others' log-likelihoods in nats.
    """

    nodes: list[Tensor]
    edges: list[Tensor | None]
    num_samples: int = 0
    impossible: int = 0
    log_prob: float = 0.0


def aggregate_flows(
    circuit: Circuit, data: Any, batch_size: int = 256, latents: Any = None
) -> Flows:
    """Flows of all regions and banks over a data set.

    Memory: the messages of one batch, and two float64 tables of the circuit's size.

    Args:
        circuit: the model; its parameters and their `.grad` are left alone.
        data: (N, V) values as for calling the circuit, or an iterable of such batches.
        batch_size: samples at a time, where `data` is one array.
        latents: (N, Z) values of the latents that are known, -1 for others, of such an array.

    Raises:
        EvidenceError: values that do not fit the circuit.
    """
    device = circuit.device
    regions = circuit.graph.regions
    total = Flows(
        nodes=[torch.zeros(r.num_units, dtype=torch.float64, device=device) for r in regions],
        edges=[
            torch.zeros_like(bank.statistics, dtype=torch.float64)
            if bank.learns_by == "em" and isinstance(bank.statistics, nn.Parameter)
            else None
            for bank in circuit.bank_list
        ],
    )
    learning = [number for number, edges in enumerate(total.edges) if edges is not None]
    parameters = [circuit.bank_list[number].statistics for number in learning]
    for evidence in evidence_batches(circuit, data, batch_size, latents):
        evaluation, of_steps, of_parameters = batch_flows(circuit, evidence, parameters)
        for step, flow in zip(circuit.step_list, of_steps, strict=True):
            sums = flow.double().sum(1)
            for row, region in enumerate(step.regions):
                total.nodes[region] += sums[row]
                # Inputs inside a product of inputs have no message of their own.
                bag = getattr(step, "bags", {row: ()})[row]
                for child in bag if region not in bag else ():
                    total.nodes[child] += sums[row]
        for number, flow in zip(learning, of_parameters, strict=True):
            edges = total.edges[number]
            assert edges is not None
            edges += flow
        log_prob = evaluation.log_prob.detach()
        possible = log_prob.isfinite()
        total.num_samples += len(log_prob)
        total.impossible += int((~possible).sum())
        total.log_prob += float(log_prob[possible].double().sum())
    return total


def evidence_batches(
    circuit: Circuit, data: Any, batch_size: int, latents: Any = None
) -> Iterator[Evidence]:
    """A data set (see `aggregate_flows`) as checked evidence."""
    arrays: Iterable[Any] = [data] if hasattr(data, "shape") else data
    for array in arrays:
        batches = circuit.reader.batches(array, latents, None, batch_size, circuit.device)
        yield from (evidence for _, evidence in batches)


def batch_flows(
    circuit: Circuit, evidence: Evidence, parameters: Sequence[Tensor]
) -> tuple[Evaluation, list[Tensor], list[Tensor]]:
    """One batch's evaluation, the flows of each step's units (E, B, K), and those of parameters."""
    with torch.enable_grad():
        evaluation = circuit.evaluate(evidence, keep=True)
        scaled = evaluation.scaled.outputs
        logs = [] if evaluation.logs is None else evaluation.logs.outputs
        grads = torch.autograd.grad(
            evaluation.log_prob.sum(),
            [*scaled, *logs, *parameters],
            allow_unused=True,
            materialize_grads=True,
        )
    of_steps = [grad.contiguous() for grad in grads[: len(scaled)]]
    for flow, extra in zip(of_steps, grads[len(scaled) : len(scaled) + len(logs)], strict=False):
        flow.index_add_(1, evaluation.again, extra.to(flow.dtype))
    return evaluation, of_steps, list(grads[len(scaled) + len(logs) :])
