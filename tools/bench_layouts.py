"""Whether the layout that the planner takes is nearly the fastest, and whether overlap would pay.

    python tools/bench_layouts.py [--ranks 2] [--rounds 5]

Ranks of this machine train small circuits in every layout of their number. Layouts take turns step
by step, so that other work on the machine slows all of them alike; medians are compared. The
planner is given what is measured first: the speed of matrix products, of an all-reduce and of a
small one. Then gathering a message and multiplying another one, one after the other against at the
same time: what overlapping the two on a node axis would save.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from distpc import structures
from distpc.circuits.circuit import Circuit
from distpc.circuits.footprint import footprint
from distpc.circuits.share_out import share_units_, splits_of
from distpc.parallel.collectives import axes, barrier
from distpc.parallel.engine import Engine
from distpc.parallel.launch import run_ranks
from distpc.parallel.mesh import Mesh
from distpc.parallel.meter import matmul_flops
from distpc.pipeline.plan import Cluster, Job, choose, options
from distpc.structures.hclt import hclt_graph
from distpc.structures.region_graph import RegionGraph
from distpc.structures.tree import Tree
from distpc.training.needs import layout_of
from distpc.training.optimizer import CircuitOptimizer

VALUES = 16
SHAPES: dict[str, tuple[Callable[[], RegionGraph], int]] = {
    "HCLT, 32 variables, K 256, 16 samples": (lambda: hclt_graph(Tree.balanced(32), 256), 16),
    "HCLT, 32 variables, K 256, 512 samples": (lambda: hclt_graph(Tree.balanced(32), 256), 512),
    "HMM, 16 steps tied, K 512, 32 samples": (lambda: structures.hmm(16, 512, tied=True), 32),
    "HMM, 16 steps, K 256, 256 samples": (lambda: structures.hmm(16, 256, tied=False), 256),
}
OVERLAPS = ((8, 256, 256), (8, 64, 1024), (32, 32, 512))
"""Regions E, batch B and units K of the message gathered and of the one multiplied."""


class Training:
    """One circuit in one layout."""

    def __init__(self, graph: RegionGraph, batch: int, mesh: Mesh, layout: list[int]) -> None:
        node_axis, zero_stage = layout
        self.batch = batch
        self.mesh = mesh = mesh.with_node_axis(node_axis)
        circuit = Circuit(graph, [VALUES] * graph.num_variables)
        circuit.set_smoothing(1.0, 1.0, 1000)
        costs = footprint(graph, circuit.schedule)
        bucket = layout_of(costs, node_axis, mesh.data_parallel, zero_stage).reduce_bucket
        splits = {}
        if node_axis > 1:
            splits = splits_of(circuit, share_units_(circuit, axes(mesh).node))
        self.engine = Engine(
            circuit,
            CircuitOptimizer(circuit.parameter_groups()),
            mesh=mesh,
            zero_stage=zero_stage,
            reduce_bucket=bucket,
            splits=splits,
        )

    def step(self) -> float:
        """Seconds of a global batch, all ranks together."""
        generator = torch.Generator().manual_seed(0)
        num_variables = self.engine.module.num_variables
        x = torch.randint(VALUES, (self.batch, num_variables), generator=generator)
        x = x.tensor_split(self.mesh.data_parallel)[self.mesh.data_rank]
        return timed(lambda: self._step(x), self.mesh)

    def _step(self, x: torch.Tensor) -> None:
        self.engine.backward(-self.engine(x).sum(), global_count=self.batch)
        self.engine.step()


def timed(action: Callable[[], Any], mesh: Mesh) -> float:
    """Seconds until all ranks have done it."""
    barrier(mesh)
    began = time.perf_counter()
    action()
    barrier(mesh)
    return time.perf_counter() - began


def measure(payload: dict[str, Any], mesh: Mesh) -> None:
    """Rank target."""
    rounds = payload["rounds"]
    found: dict[str, Any] = {"flops": matmul_flops(mesh.device), "shapes": {}, "overlaps": []}
    large, small = torch.ones(8_000_000), torch.ones(1)
    seconds = [
        median(timed(lambda t=tensor: dist.all_reduce(t), mesh) for _ in range(rounds))
        for tensor in (large, small)
    ]
    sent = 2 * 4 * large.numel() * (mesh.world_size - 1) / mesh.world_size
    found |= {"link": sent / (seconds[0] - seconds[1]), "latency": seconds[1]}
    for name, layouts in payload["layouts"].items():
        build, batch = SHAPES[name]
        trainings = [Training(build(), batch, mesh, layout) for layout in layouts]
        steps = [[training.step() for training in trainings] for _ in range(rounds + 2)]
        # The first steps do what no other has to.
        found["shapes"][name] = [median(times) for times in zip(*steps[2:], strict=True)]
    found["overlaps"] = [overlap(shape, mesh, rounds) for shape in OVERLAPS]
    if mesh.is_main:
        Path(payload["out"]).write_text(json.dumps(found))


def overlap(shape: tuple[int, int, int], mesh: Mesh, rounds: int) -> tuple[float, float]:
    """Seconds of a gather and then a product, and of both at the same time."""
    num_regions, batch, units = shape
    message = torch.rand(num_regions, batch, units // mesh.world_size)
    out = torch.empty(mesh.world_size, *message.shape)
    u, weights = torch.rand(num_regions, batch, units), torch.rand(num_regions, units, units)

    def gather(is_async: bool) -> Any:
        return dist.all_gather_into_tensor(out.view(-1), message.view(-1), async_op=is_async)

    def in_turn() -> None:
        gather(False)
        torch.bmm(u, weights)

    def at_once() -> None:
        work = gather(True)
        torch.bmm(u, weights)
        work.wait()

    pairs = [(timed(in_turn, mesh), timed(at_once, mesh)) for _ in range(4 * rounds)]
    in_turns, at_onces = zip(*pairs, strict=True)
    return median(in_turns), median(at_onces)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="steps of a layout")
    arguments = parser.parse_args()
    jobs = {name: job(build(), batch) for name, (build, batch) in SHAPES.items()}
    roomy = Cluster(1, arguments.ranks, 2**40)
    found_of = {name: options(of_name, roomy) for name, of_name in jobs.items()}
    layouts = {
        name: [[o.layout.node_axis, o.layout.zero_stage] for o in found]
        for name, found in found_of.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        sys.path.insert(0, str(Path(__file__).parent))
        run_ranks(
            "bench_layouts:measure",
            {"out": str(out), "layouts": layouts, "rounds": arguments.rounds},
            num_ranks=arguments.ranks,
            threads_per_rank=1,
            log_folder=Path(folder) / "logs",
        )
        found = json.loads(out.read_text())
    gigabits = 8 * found["link"] / 1e9
    cluster = Cluster(
        1,
        arguments.ranks,
        2**40,
        gigabits,
        gigabits,
        1e6 * found["latency"],
        found["flops"] / 1e12,
    )
    print(
        f"{found['flops'] / 1e9:.1f} GFLOP/s a rank, links {gigabits:.2f} Gb/s, "
        f"{1e3 * found['latency']:.2f} ms a collective"
    )
    for name, of_name in jobs.items():
        planned = options(of_name, cluster)
        chosen = choose(planned, cluster)
        seconds = dict(zip(map(tuple, layouts[name]), found["shapes"][name], strict=True))
        axis = chosen.layout.node_axis
        taken = seconds[axis, chosen.layout.zero_stage]
        other = min(took for (node_axis, _), took in seconds.items() if node_axis != axis)
        print(
            f"\n{name}: takes {chosen.layout.name}, {taken / other:.2f} of the other axis, "
            f"{taken / min(seconds.values()):.2f} of the fastest"
        )
        for option in planned:
            key = option.layout.node_axis, option.layout.zero_stage
            print(
                f"  {option.layout.name:14} planned {1e3 * option.seconds:8.1f} ms, "
                f"measured {1e3 * seconds[key]:8.1f} ms"
            )
    print("\noverlap of a gather with the next product: time at once / in turn")
    for shape, (in_turn, at_once) in zip(OVERLAPS, found["overlaps"], strict=True):
        print(f"  E, B, K = {shape}: {at_once / in_turn:.2f} of {1e3 * in_turn:.1f} ms")


def job(graph: RegionGraph, batch: int) -> Job:
    """What is planned for."""
    schedule = Circuit(graph, [VALUES] * graph.num_variables).schedule
    return Job(footprint(graph, schedule), batch)


if __name__ == "__main__":
    main()
