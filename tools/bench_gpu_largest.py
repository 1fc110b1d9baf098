#!/usr/bin/env python
"""The largest circuit that trains on one GPU: parameters, memory, TFLOP/s over 100 steps.

    python tools/bench_gpu_largest.py --json largest.json
    python tools/bench_gpu_largest.py --sizes hclt:3072:2304 hclt:3072:2048 --steps 100

Sizes are tried from the first to the last, which should be the smallest; the first that trains
ends the search. Circuits are drawn on the GPU and trained by the fused step, statistics in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from circuit_bench.cases import Case
from circuit_bench.ceilings import ceilings
from circuit_bench.gpu_bench import key_of
from circuit_bench.gpu_clock import at_most, free, held, is_out_of_memory, peak
from circuit_bench.gpu_table import machine
from circuit_bench.ours_gpu import OursGpu
from circuit_bench.traffic import step_flops

SIZES = ["hclt:3072:2560:256", "hclt:3072:2432", "hclt:3072:2304", "hclt:3072:2048"]


def train(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Train a size; what came of it."""
    row: dict[str, Any] = key_of(case)
    begun, before = time.perf_counter(), held(options.device)
    try:
        with at_most(options.limit):
            row |= _train(case, options, before)
    except Exception as error:
        short = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        row["failed"] = short[:300]
    row["seconds"] = round(time.perf_counter() - begun, 1)
    return row


def _train(case: Case, options: argparse.Namespace, before: int) -> dict[str, Any]:
    batches = case.batches(4, options.device)
    circuit = case.circuit(device=options.device)
    ours = OursGpu(circuit, batches, case.dtype, fused=not options.plain)
    first = float(ours.log_prob(batches[0]).double().mean())
    _wait(options.device)
    begun = time.perf_counter()
    for _ in range(options.steps):
        ours.step()
    _wait(options.device)
    taken = (time.perf_counter() - begun) / options.steps
    last = float(ours.log_prob(batches[0]).double().mean())
    return {
        "num_parameters": circuit.num_parameters,
        "steps": options.steps,
        "step_ms": round(1e3 * taken, 2),
        "tflops": round(step_flops(case) / taken / 1e12, 2),
        "peak_bytes": peak(options.device) - before,
        "setting": ours.setting,
        "warm_seconds": round(ours.warm_seconds, 1),
        "log_prob_before": round(first, 3),
        "log_prob_after": round(last, 3),
        "trained": bool(last > first),
    }


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", default=SIZES, metavar="CASE", help="as of bench_circuit.py")
    add("--device", default="cuda")
    add("--batch", type=int, default=512)
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    add("--vocabulary", type=int, default=33_279)
    add("--steps", type=int, default=100)
    add("--limit", type=float, default=240.0, help="seconds a size may take (%(default)s)")
    add("--plain", action="store_true", help="the ordinary step instead of the fused one")
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Go down the sizes until one trains."""
    options = read_options()
    rows: list[dict[str, Any]] = []
    found = ceilings(options.device, rounds=5)
    for name in options.sizes:
        case = Case.parse(name, options.batch, options.dtype, options.vocabulary)
        rows.append(train(case, options))
        free(options.device)
        if "tflops" in rows[-1]:
            rows[-1]["fraction_of_gemm"] = round(rows[-1]["tflops"] / found["bf16_tflops"], 4)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if options.json:
            about = {"machine": {**machine(options.device), "ceilings": found}, "sizes": rows}
            options.json.write_text(json.dumps(about, indent=2) + "\n")
        if "tflops" in rows[-1]:
            return
    sys.exit("no size trained")


if __name__ == "__main__":
    main()
