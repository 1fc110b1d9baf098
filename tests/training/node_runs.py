"""What the ranks of test_node_axis.py run, and the same trainings in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc import structures
from distpc.artifacts.tensors import write_tensors
from distpc.circuits.circuit import Circuit
from distpc.circuits.share_out import share_units_, splits_of
from distpc.parallel.checks import check_replicas
from distpc.parallel.collectives import axes, sum_across
from distpc.parallel.engine import Engine
from distpc.parallel.mesh import Mesh
from distpc.structures.hclt import hclt_graph
from distpc.structures.patches import HcltLeaf
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing, make_rule

STEPS, BATCH, STATES, VALUES = 10, 22, 12, 5
SMOOTHING = Smoothing(0.1, 0.1, 1000)
STEP_SIZES = {"online_em": 0.2, "adam": 0.05}


class Case(NamedTuple):
    """One training.

    Attributes:
        structure: a key of `STRUCTURES`.
        rule: online_em or adam.
        node_parallel: ranks of the node axis.
        zero_stage: 0 .. 3.
        accumulation: micro-batches of the largest share.
    """

    structure: str
    rule: str
    node_parallel: int = 1
    zero_stage: int = 0
    accumulation: int = 1

    @property
    def name(self) -> str:
        return " ".join(map(str, self))


def patch_circuit() -> RegionGraph:
    pixels = np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    leaf = HcltLeaf(Tree.balanced(4), STATES, num_groups=2)
    return structures.patch_graph(pixels, Tree.balanced(4), STATES, leaf)


STRUCTURES: dict[str, Callable[[], RegionGraph]] = {
    "hclt": lambda: hclt_graph(Tree.balanced(9), STATES),
    "hmm": lambda: structures.hmm(6, STATES),
    "quad_graph": lambda: structures.quad_graph((4, 4), STATES),
    "patches": patch_circuit,
}


def circuit_of(case: Case) -> Circuit:
    graph = STRUCTURES[case.structure]()
    # Folds of two matrices, so that ZeRO 3 has several to gather.
    fold = 8 * STATES * STATES
    circuit = Circuit(graph, [VALUES] * graph.num_variables, max_fold_bytes=fold)
    make_rule(case.rule, circuit, SMOOTHING).start()
    return circuit


def optimizer_of(case: Case, circuit: Circuit) -> CircuitOptimizer:
    rule = make_rule(case.rule, circuit, SMOOTHING)
    groups = circuit.parameter_groups()
    return CircuitOptimizer(groups, step_size=STEP_SIZES[case.rule], rule=rule)


def batch_of(case: Case, step: int, num_variables: int) -> Tensor:
    """(BATCH, V): neighbouring values are alike, the last batch is the one evaluated."""
    generator = torch.Generator().manual_seed(step)
    base = torch.randint(VALUES, (BATCH, 1), generator=generator)
    return (base + torch.randint(3, (BATCH, num_variables), generator=generator)) % VALUES


def train_alone(case: Case) -> dict[str, Tensor]:
    """The same in this process, without any engine."""
    circuit = circuit_of(case)
    optimizer = optimizer_of(case, circuit)
    nats = []
    for step in range(STEPS):
        log_prob = circuit(batch_of(case, step, circuit.num_variables))
        optimizer.zero_grad(set_to_none=True)
        (-log_prob.sum() / BATCH).backward()
        optimizer.step()
        nats.append(log_prob.detach().double().sum() / BATCH)
    return {"nats": torch.stack(nats), **circuit.state_dict()}


def train_shared(case: Case, mesh: Mesh) -> dict[str, Tensor]:
    """A training on all ranks; the whole result on rank 0."""
    mesh = mesh.with_node_axis(case.node_parallel)
    circuit = circuit_of(case)
    splits = splits_of(circuit, share_units_(circuit, axes(mesh).node))
    engine = Engine(
        circuit,
        optimizer_of(case, circuit),
        mesh=mesh,
        zero_stage=case.zero_stage,
        reduce_bucket=500,
        splits=splits,
    )
    circuit.any_rank = lambda flag: bool(sum_across(torch.tensor(float(flag)), mesh) > 0)
    share = -(-BATCH // mesh.data_parallel)
    nats = []
    for step in range(STEPS):
        x = batch_of(case, step, circuit.num_variables)
        x = x.tensor_split(mesh.data_parallel)[mesh.data_rank]
        pieces = engine.micro_batches(
            len(x), global_count=BATCH, micro_batch=-(-share // case.accumulation)
        )
        total = torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            log_prob = engine(x[piece])
            engine.backward(-log_prob.sum(), global_count=BATCH)
            total += log_prob.detach().double().sum() * (mesh.node_rank == 0)
        engine.step()
        nats.append(sum_across(total, mesh) / BATCH)
    check_replicas(engine, STEPS)
    return {"nats": torch.stack(nats), **engine.full_state()}


def train_all(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target: every case in these processes, a new engine and new groups each."""
    tensors: dict[str, Tensor] = {}
    for values in payload["cases"]:
        case = Case(*values)
        found = train_shared(case, mesh)
        tensors |= {f"{case.name}/{name}": tensor for name, tensor in found.items()}
    if mesh.is_main:
        write_tensors(Path(payload["out"]), tensors)
