"""Bytes that a training step sends between hosts, counted by their interfaces, as planned."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from checks import check, wait_for_ends
from network import Host

from distpc.circuits.compiled import compile_graph
from distpc.circuits.footprint import footprint, shared
from distpc.parallel.memory import Layout, share
from distpc.parallel.traffic import traffic
from distpc.structures.hclt import hclt_graph
from distpc.structures.tree import Tree

_TARGETS = Path(__file__).resolve().parents[2] / "tests" / "pipeline" / "plan_targets.py"
_TOLERANCE = 0.05
_CASES: list[dict[str, Any]] = [
    {
        "num_variables": 64,
        "num_states": 256,
        "num_categories": 16,
        "max_fold_bytes": 2**21,
        "reduce_bucket": 1_000_000,
        "zero_stage": stage,
        "node_axis": node_axis,
        "batch": 256,
        "micro_batch": 64,
    }
    for stage, node_axis in ((0, 1), (3, 1), (0, 2))
]


def compare_traffic(hosts: list[Host], folder: Path) -> None:
    """Train a few steps of every case with one rank a host; bytes a step within 5 %."""
    folder.mkdir()
    (folder / "payload.json").write_text(json.dumps({"cases": _CASES, "out": str(folder)}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts))]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29400"]
    launcher += ["--nproc-per-node", "1"]
    path = os.pathsep.join([str(_TARGETS.parent), *sys.path])
    started = {}
    for number, host in enumerate(hosts):
        command = [*launcher, "--local-addr", host.address]
        command += ["--rdzv-conf", f"is_host={int(number == 0)}"]
        command += [str(_TARGETS), str(len(hosts)), str(folder)]
        started[host.name] = host.start(
            "traffic", command, PYTHONPATH=path, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"
        )
    wait_for_ends(started, 600)
    files = [folder / f"rank-{rank}.json" for rank in range(len(hosts))]
    ranks = [json.loads(file.read_text()) for file in files]
    for number, case in enumerate(_CASES):
        counted = sum(rank[number]["sent_bytes"] for rank in ranks) / len(ranks)
        planned = _planned(case, len(hosts))
        check(
            abs(planned / counted - 1) < _TOLERANCE,
            f"bytes a step, ZeRO {case['zero_stage']}, node axis {case['node_axis']}",
            f"planned {planned / 2**20:.2f} MiB, counted {counted / 2**20:.2f} MiB",
        )


def _planned(case: dict[str, Any], num_ranks: int) -> float:
    """Bytes that a rank sends in a step, as the planner counts them."""
    graph = hclt_graph(Tree.balanced(case["num_variables"]), case["num_states"])
    categories = [case["num_categories"]] * case["num_variables"]
    costs = footprint(graph, compile_graph(graph, categories, case["max_fold_bytes"]))
    data_axis = num_ranks // case["node_axis"]
    layout = Layout(case["node_axis"], data_axis, case["zero_stage"], case["reduce_bucket"])
    local = share(case["batch"], data_axis)
    return traffic(
        shared(costs, case["node_axis"]),
        layout,
        local_batch=local,
        num_micro_batches=share(local, case["micro_batch"]),
        scatters=False,
    ).total
