#!/usr/bin/env python
"""What bfloat16 costs in likelihood: MNIST, one circuit, one order of samples, three ways to train.

    python tools/bench_gpu_bpd.py --make bpd.npz                      once, on any machine
    python tools/bench_gpu_rounding.py --data bpd.npz --json rounding.json

`distpc.fit` by the ordinary engine in float32, by the fused step in float32, and by the fused step
in bfloat16, its default on a GPU. Test bits per dimension of each circuit by the ordinary engine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from circuit_bench import bpd_data
from circuit_bench.gpu_table import machine

import distpc
from distpc.circuits.circuit import Circuit
from distpc.circuits.kernels.step import FastStep
from distpc.structures.hclt import hclt_graph


def bits(circuit: Circuit, x: torch.Tensor) -> float:
    """Per dimension, by the ordinary engine in float32."""
    with torch.no_grad():
        total = sum(float(circuit(part.long()).double().sum()) for part in x.split(512))
    return -total / (x.numel() * math.log(2))


def train_float32(circuit: Circuit, x: torch.Tensor, epochs: int) -> None:
    """As `distpc.fit` with the fused step, which is bfloat16 there."""
    from distpc.training import fitting_fused

    class Exact(FastStep):
        """In float32."""

        def __init__(self, circuit: Circuit, batch_size: int, **settings: Any) -> None:
            super().__init__(circuit, batch_size, **{**settings, "dtype": torch.float32})

    fitting_fused.FastStep = Exact  # type: ignore[misc]
    distpc.fit(circuit, x, epochs=epochs, batch_size=512, fused=True, progress=False)
    fitting_fused.FastStep = FastStep  # type: ignore[misc]


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="NPZ")
    add("--set", default="mnist")
    add("--device", default="cuda")
    add("--states", type=int, default=64)
    add("--samples", type=int, default=20_480)
    add("--epochs", type=int, default=8)
    add("--json", type=Path)
    add("--skip-ordinary", action="store_true", help="leave out the ordinary engine")
    options = parser.parse_args()
    data = bpd_data.load(options.data)[options.set]
    train = torch.from_numpy(data.train)[: options.samples]
    test = torch.from_numpy(data.test).to(options.device)
    graph = hclt_graph(data.tree, options.states)
    rows = {}
    ways = {
        "fused, bfloat16": lambda c: distpc.fit(
            c, train, epochs=options.epochs, batch_size=512, fused=True, progress=False
        ),
        "fused, float32": lambda c: train_float32(c, train, options.epochs),
        "ordinary, float32": lambda c: distpc.fit(
            c, train, epochs=options.epochs, batch_size=512, fused=False, progress=False
        ),
    }
    if options.skip_ordinary:
        del ways["ordinary, float32"]
    for name, way in ways.items():
        circuit = Circuit(graph, [256] * graph.num_variables, device=options.device)
        begun = time.perf_counter()
        way(circuit)
        seconds = time.perf_counter() - begun
        rows[name] = {"test_bpd": round(bits(circuit, test), 6), "seconds": round(seconds, 2)}
        print(name, rows[name], flush=True)
    found = [row["test_bpd"] for row in rows.values()]
    content = {
        "machine": machine(options.device),
        "set": options.set,
        "num_states": options.states,
        "epochs": options.epochs,
        "train_samples": len(train),
        "ways": rows,
        "cost_bpd": round(found[0] - found[-1], 6),
    }
    print(json.dumps(content))
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
