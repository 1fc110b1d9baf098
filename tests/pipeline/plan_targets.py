"""What the planner's tests run on ranks: training steps, with the memory and bytes they took."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distpc.circuits.circuit import Circuit
from distpc.circuits.random_start import RandomStart
from distpc.parallel.collectives import barrier
from distpc.parallel.engine import Engine
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh
from distpc.structures.hclt import hclt_graph
from distpc.structures.tree import Tree
from distpc.training.lay_out import lay_out_
from distpc.training.optimizer import CircuitOptimizer
from distpc.training.rules import Smoothing, make_rule

SMALL = {
    "num_variables": 4,
    "num_states": 4,
    "num_categories": 3,
    "batch": 4,
    "micro_batch": 4,
    "max_fold_bytes": 2**20,
    "reduce_bucket": 1000,
}
STEPS = 3
SMOOTHING = Smoothing(1.0, 1.0, 1000)


def measure(payload: dict[str, Any], mesh: Mesh) -> None:
    """Train every case for a few steps; every rank writes what each of them took."""
    for stage in range(4):
        # Loads what is loaded at first use.
        _train({**SMALL, "zero_stage": stage}, mesh)
    results = [_train(case, mesh) for case in payload["cases"]]
    Path(payload["out"], f"rank-{mesh.rank}.json").write_text(json.dumps(results))


def _train(case: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    """A few steps of an HCLT; on one rank and with a case that says so, without any engine.

    Returns:
        laid_out_bytes: most that the process held, above what it held before all, until it had its
            share of the circuit;
        ready_bytes: until there was an engine for it, too;
        peak_bytes: most that the process held in a step, above what it held before all;
        sums_bytes: statistics and flows of its sums, at the end of a backward pass;
        sent_bytes: that all processes of this host or network namespace sent in a step;
        step_seconds: the fastest.
    """
    _forget_peak()
    idle = _status("VmRSS")
    graph = hclt_graph(Tree.balanced(case["num_variables"]), case["num_states"])
    categories = [case["num_categories"]] * case["num_variables"]
    circuit = Circuit(graph, categories, max_fold_bytes=case["max_fold_bytes"], device="meta")
    make_rule(case.get("rule", "online_em"), circuit, SMOOTHING).resume()
    if case.get("recompute"):
        circuit.recompute_messages_()
    mesh = mesh.with_node_axis(case.get("node_axis", 1))
    bucket = case["reduce_bucket"]
    start = RandomStart(circuit, 0, 1.0)
    splits = lay_out_(circuit, start, mesh, zero_stage=case["zero_stage"], reduce_bucket=bucket)
    del start
    laid_out = _status("VmHWM") - idle
    rule = make_rule(case.get("rule", "online_em"), circuit, SMOOTHING)
    if case["zero_stage"] > 0:
        rule.work_on_shards()
    optimizer = CircuitOptimizer(circuit.parameter_groups(), step_size=0.01, rule=rule)
    engine: Engine | Plain = Plain(circuit, optimizer)
    if not case.get("plain"):
        engine = Engine(
            circuit,
            optimizer,
            mesh=mesh,
            zero_stage=case["zero_stage"],
            reduce_bucket=bucket,
            splits=splits,
        )
    ready = _status("VmHWM") - idle
    _forget_peak()
    # The first pass under ZeRO 3 finds out in which order blocks are gathered.
    seconds = [_step(engine, case, mesh, 0)[0]]
    barrier(mesh)
    before = _sent_bytes()
    for step in range(1, STEPS):
        took, sums = _step(engine, case, mesh, step)
        seconds.append(took)
    barrier(mesh)
    sent = _sent_bytes() - before
    return {
        "laid_out_bytes": laid_out,
        "ready_bytes": ready,
        "peak_bytes": _status("VmHWM") - idle,
        "sums_bytes": sums,
        "sent_bytes": sent / (STEPS - 1),
        "step_seconds": min(seconds),
    }


class Plain:
    """What an engine does, done by torch alone."""

    def __init__(self, module: Circuit, optimizer: CircuitOptimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def micro_batches(self, num_local: int, *, global_count: int, micro_batch: int) -> list[slice]:
        return [slice(first, first + micro_batch) for first in range(0, num_local, micro_batch)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)

    def backward(self, loss: torch.Tensor, *, global_count: int) -> None:
        (loss / global_count).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _step(engine: Engine | Plain, case: dict[str, Any], mesh: Mesh, step: int) -> tuple[float, int]:
    """One global batch; its seconds, and the bytes of statistics and flows of sums."""
    generator = torch.Generator().manual_seed(step)
    shape = case["batch"], case["num_variables"]
    x = torch.randint(case["num_categories"], shape, generator=generator)
    x = x.tensor_split(mesh.data_parallel)[mesh.data_rank]
    begun = time.monotonic()
    pieces = engine.micro_batches(
        len(x), global_count=case["batch"], micro_batch=case["micro_batch"]
    )
    for piece in pieces:
        engine.backward(-engine(x[piece]).sum(), global_count=case["batch"])
    held = [
        tensor.numel() * tensor.element_size()
        for name, parameter in engine.module.named_parameters()
        for tensor in (parameter, parameter.grad)
        if ".sum_" in name and tensor is not None
    ]
    engine.step()
    return time.monotonic() - begun, sum(held)


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _forget_peak() -> None:
    """The peak starts again from what the process holds now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _sent_bytes() -> int:
    """Of all interfaces: the loopback one among ranks of one host, another one between hosts."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[8]) for line in lines)


if __name__ == "__main__":
    # num_ranks, folder with payload.json: what a network namespace of its own runs.
    num_ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    run_ranks(
        "plan_targets:measure",
        json.loads((folder / "payload.json").read_text()),
        num_ranks=num_ranks,
        threads_per_rank=1,
        log_folder=folder / "logs",
    )
