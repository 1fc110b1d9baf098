"""What the ranks of test_node_axis.py run, and the same trainings in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distpc import structures
from distpc.artifacts.files import write_json
from distpc.artifacts.tensors import write_tensors
from distpc.circuits.circuit import Circuit
from distpc.circuits.fill import Source, fill_
from distpc.circuits.random_start import RandomStart
from distpc.errors import TrainingError
from distpc.parallel.checks import check_replicas
from distpc.parallel.collectives import sum_across
from distpc.parallel.engine import Engine
from distpc.parallel.mesh import Mesh
from distpc.structures.hclt import hclt_graph
from distpc.structures.patches import HcltLeaf
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree
from distpc.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    Saver,
    TrainingFacts,
    load_optimizer,
    take_snapshot,
)
from distpc.training.lay_out import lay_out_
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing, make_rule

STEPS, BATCH, STATES, VALUES, SEED = 10, 22, 12, 5, 0
NOISE = 3.0
"""Of random parameters. At 1 units of the quad graph's root differ by rounding alone, which Adam,
dividing gradients by their own size, turns into steps: one process that adds the same batch up in
six parts then ends 2e-4 away from itself, and at 3 less than 2e-6."""
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
        recompute: whether backward computes messages again.
    """

    structure: str
    rule: str
    node_parallel: int = 1
    zero_stage: int = 0
    accumulation: int = 1
    recompute: bool = False

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


def circuit_of(case: Case, device: str = "cpu") -> Circuit:
    graph = STRUCTURES[case.structure]()
    # Folds of two matrices, so that ZeRO 3 has several to gather.
    fold = 8 * STATES * STATES
    values = [VALUES] * graph.num_variables
    return Circuit(graph, values, seed=SEED, init_noise=NOISE, max_fold_bytes=fold, device=device)


def beginning(case: Case, saved: Checkpoint | None) -> tuple[Circuit, Source | None]:
    """The circuit of a training on ranks, and where its values come from; as `finetune` does it."""
    circuit = circuit_of(case, "meta")
    source = saved or RandomStart(circuit, SEED, NOISE)
    rule = make_rule(case.rule, circuit, SMOOTHING)
    if saved is not None or rule.keeps_statistics:
        rule.resume()
        return circuit, source
    fill_(circuit, source)
    make_rule(case.rule, circuit, SMOOTHING).start()
    return circuit, None


def optimizer_of(case: Case, circuit: Circuit) -> CircuitOptimizer:
    rule = make_rule(case.rule, circuit, SMOOTHING)
    if case.zero_stage > 0:
        rule.work_on_shards()
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
    make_rule(case.rule, circuit, SMOOTHING).start()
    optimizer = optimizer_of(case, circuit)
    nats = []
    for step in range(STEPS):
        log_prob = circuit(batch_of(case, step, circuit.num_variables))
        optimizer.zero_grad(set_to_none=True)
        (-log_prob.sum() / BATCH).backward()
        optimizer.step()
        nats.append(log_prob.detach().double().sum() / BATCH)
    return {"nats": torch.stack(nats), **circuit.state_dict()}


class Shared:
    """A training on all ranks, from the start or from a checkpoint."""

    def __init__(self, case: Case, mesh: Mesh, saved: Checkpoint | None = None) -> None:
        self.case = case
        self.mesh = mesh = mesh.with_node_axis(case.node_parallel)
        self.circuit, source = beginning(case, saved)
        if case.recompute:
            self.circuit.recompute_messages_()
        splits = lay_out_(self.circuit, source, mesh, zero_stage=case.zero_stage, reduce_bucket=500)
        optimizer = optimizer_of(case, self.circuit)
        assert optimizer.rule is not None
        self.rule = optimizer.rule
        self.engine = Engine(
            self.circuit,
            optimizer,
            mesh=mesh,
            zero_stage=case.zero_stage,
            reduce_bucket=500,
            splits=splits,
        )
        if saved is not None:
            load_optimizer(self.engine, saved)
        self.circuit.any_rank = lambda flag: bool(sum_across(torch.tensor(float(flag)), mesh) > 0)

    def steps(self, first: int, last: int) -> Tensor:
        """Mean nats of each batch before its update."""
        share = -(-BATCH // self.mesh.data_parallel)
        nats = []
        for step in range(first, last):
            x = batch_of(self.case, step, self.circuit.num_variables)
            x = x.tensor_split(self.mesh.data_parallel)[self.mesh.data_rank]
            pieces = self.engine.micro_batches(
                len(x), global_count=BATCH, micro_batch=-(-share // self.case.accumulation)
            )
            total = torch.zeros((), dtype=torch.float64)
            for piece in pieces:
                log_prob = self.engine(x[piece])
                self.engine.backward(-log_prob.sum(), global_count=BATCH)
                total += log_prob.detach().double().sum() * (self.mesh.node_rank == 0)
            self.engine.step()
            nats.append(sum_across(total, self.mesh) / BATCH)
        # Rows at the scale of one process's, to be compared.
        self.engine.rewrite(self.rule.settle)
        check_replicas(self.engine, last)
        return torch.stack(nats)


def run_all(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target: everything in these processes, a new engine and new groups each time."""
    tensors: dict[str, Tensor] = {}
    out = Path(payload["out"])
    for values in payload["cases"]:
        case = Case(*values)
        training = Shared(case, mesh)
        found = {"nats": training.steps(0, STEPS), **training.engine.full_state()}
        tensors |= {f"{case.name}/{name}": tensor for name, tensor in found.items()}
    for number, (first, second) in enumerate(payload.get("moves", ())):
        nats = move(Case(*first), Case(*second), mesh, out / f"move-{number}")
        tensors[f"move-{number}"] = nats
    if payload.get("spoils"):
        told = [spoil(Case(*values), name, mesh) for values, name in payload["spoils"]]
        write_json(out / f"told-{mesh.rank}.json", told)
    if mesh.is_main:
        write_tensors(out / "found.safetensors", tensors)


def move(first: Case, second: Case, mesh: Mesh, folder: Path) -> Tensor:
    """Half of a training in one layout, saved; loaded, saved again and ended in another."""
    training = Shared(first, mesh)
    nats = training.steps(0, STEPS // 2)
    saver = Saver(Checkpoints(folder / "first", {}), training.mesh)
    saver.save(TrainingFacts(step=1), take_snapshot(training.engine))
    saver.wait()
    saved = saver.checkpoints.newest(mesh)
    assert saved is not None
    training = Shared(second, mesh, saved)
    saver = Saver(Checkpoints(folder / "second", {}), training.mesh)
    saver.save(TrainingFacts(step=1), take_snapshot(training.engine))
    saver.wait()
    return torch.cat([nats, training.steps(STEPS // 2, STEPS)])


def spoil(case: Case, name: str, mesh: Mesh) -> str:
    """What the ranks are told when one of them holds an entry of its own."""
    training = Shared(case, mesh)
    parameter: Any = dict(training.circuit.named_parameters())[name]
    if mesh.rank == 3:
        held = getattr(parameter, "ds_tensor", parameter).data.view(-1)
        held[1] = torch.nextafter(held[1], torch.tensor(9.0))
    try:
        check_replicas(training.engine, 7)
    except TrainingError as error:
        return str(error)
    return "nothing"
