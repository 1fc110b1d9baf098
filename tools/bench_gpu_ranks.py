#!/usr/bin/env python
"""Data-parallel steps on one GPU: one rank over NCCL, several ranks over gloo, against one process.

    python tools/bench_gpu_ranks.py --json ranks.json

Ranks take turns at a batch's samples, add up their flows by an all-reduce and update alike; the
statistics have to end where those of one process over the whole batch do, on the device where they
are said to be. torch.distributed alone: what DeepSpeed does with the same collectives on several
GPUs is in the tests of `parallel`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from circuit_bench.cases import Case
from circuit_bench.gpu_table import machine

from distpc.training.optimizer import CircuitOptimizer

CASE = Case("hclt", 64, 32, 64)
STEPS, STEP_SIZE = 4, 0.2
WORLDS = (("nccl", 1), ("gloo", 2), ("gloo", 4))


def train(rank: int, ranks: int, device: str) -> list[torch.Tensor]:
    """Statistics after some steps on this rank's share of every batch."""
    circuit = CASE.circuit().to(device)
    optimizer = CircuitOptimizer(circuit.parameter_groups(), step_size=STEP_SIZE)
    for x in CASE.batches(STEPS, device):
        optimizer.zero_grad()
        log_prob = circuit(x[rank::ranks])
        (-log_prob.sum() / len(x)).backward()
        for parameter in circuit.parameters():
            assert parameter.grad is not None
            assert str(parameter.device).split(":")[0] == device.split(":")[0]
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
        optimizer.step()
    return [p.detach().cpu() for p in circuit.parameters()]


def run_rank(rank: int, ranks: int, backend: str, device: str, folder: str) -> None:
    """One process of a world; rank 0 writes what came out."""
    # A launcher's own variables would send collectives elsewhere.
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    if rank == 0:
        torch.save(train(rank, ranks, device), f"{folder}/statistics.pt")
    else:
        train(rank, ranks, device)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Every world against one process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="on a CPU NCCL is left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    expected = train(0, 1, options.device)
    rows: list[dict[str, Any]] = []
    for backend, ranks in WORLDS:
        if backend == "nccl" and options.device == "cpu":
            continue
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, (ranks, backend, options.device, folder), nprocs=ranks)
            found = torch.load(f"{folder}/statistics.pt", weights_only=True)
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        row = {"backend": backend, "ranks": ranks, "relative_error": error}
        rows.append({**row, "seconds": round(time.perf_counter() - begun, 1)})
        print(json.dumps(rows[-1]), flush=True)
        if not error < 1e-5:
            raise SystemExit(f"{ranks} ranks over {backend} end elsewhere than one process")
    if options.json:
        content = {
            "machine": machine(options.device.split(":")[0]),
            "case": str(CASE),
            "worlds": rows,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
