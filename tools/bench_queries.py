#!/usr/bin/env python3
"""How fast queries are on many images, and that their memory is bounded.

    python tools/bench_queries.py [MODEL] [--images 10000] [--json]
    python tools/bench_queries.py --synthetic --num-states 64      28 x 28 pixels, 256 values

Without a model, a small circuit is trained on the digits that scikit-learn ships. Half of every
image is hidden. Each query runs on a tenth of the images and on all of them: what it holds beyond
its answer (`growth_bytes`: peak resident memory above that before the query, less the answer
where the query returns one) must not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from distpc.circuits.circuit import Circuit

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


def memory(field: str) -> int | None:
    """A field of this process's status in bytes (VmRSS, VmHWM); None where there is none."""
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def digits_circuit(num_states: int, epochs: int) -> tuple[Circuit, torch.Tensor]:
    """A hidden Chow-Liu tree trained on scikit-learn's digits, and the digits (1797, 64)."""
    from sklearn.datasets import load_digits

    import distpc

    x = load_digits().data.astype(np.int64)
    graph = distpc.structures.hclt(x, num_states)
    circuit = distpc.Circuit(graph, [17] * 64, seed=0)
    distpc.fit(circuit, x, epochs=epochs, progress=False)
    return circuit, torch.from_numpy(x)


def synthetic_circuit(num_states: int, side: int) -> tuple[Circuit, torch.Tensor]:
    """A random circuit over side x side pixels of 256 values (a comb of pixels: down the first
    column, right along every row), and images drawn from it."""
    import distpc
    from distpc.structures import Tree, hclt_graph

    parents = [
        -1 if pixel == 0 else pixel - 1 if pixel % side else pixel - side
        for pixel in range(side * side)
    ]
    circuit = distpc.Circuit(hclt_graph(Tree(tuple(parents)), num_states), [256] * side**2, seed=0)
    return circuit, circuit.sample(500, seed=0)


def queries_of(circuit: Circuit, observed: torch.Tensor) -> dict[str, Callable[[Any], Any]]:
    """What is timed: each takes images (B, V)."""
    from distpc.circuits.queries import conditional_blocks

    hidden = torch.nonzero(~observed)[:, 0].tolist()

    def conditionals(x: torch.Tensor) -> None:
        # All of them are C times larger than the images: a caller takes them block by block.
        for _, block in conditional_blocks(circuit, x, observed, hidden):
            assert block.isfinite().all()

    return {
        "conditional_samples": lambda x: circuit.sample(1, seed=0, x=x, observed=observed),
        "marginal_likelihoods": lambda x: circuit.log_prob(x, observed),
        "conditionals_of_every_hidden_pixel": conditionals,
        "expectations": lambda x: circuit.expectation(x, observed, hidden),
        "mpe": lambda x: circuit.mpe(x, observed),
    }


def answer_bytes(answer: Any) -> int:
    """Bytes of the tensors that a query returned."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def measure(query: Callable[[Any], Any], x: torch.Tensor) -> dict[str, Any]:
    """Seconds, images a second, and memory of one run."""
    before = memory("VmRSS")
    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5")
    start = time.perf_counter()
    answer = query(x)
    seconds = time.perf_counter() - start
    peak, own = memory("VmHWM"), answer_bytes(answer)
    growth = None if peak is None or before is None else max(0, peak - before - own)
    return {
        "images": len(x),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(x) / seconds, 1),
        "answer_bytes": own,
        "growth_bytes": growth,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="model folder (default: digits)")
    parser.add_argument("--synthetic", action="store_true", help="a random circuit, not trained")
    parser.add_argument("--side", type=int, default=28, help="of synthetic images (default 28)")
    parser.add_argument("--num-states", type=int, default=32, help="K (default 32)")
    parser.add_argument("--epochs", type=int, default=5, help="on the digits (default 5)")
    parser.add_argument("--images", type=int, default=10_000, help="(default 10000)")
    parser.add_argument("--only", nargs="*", help="these queries alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model is not None:
        import distpc

        circuit = distpc.load(options.model)
        images = circuit.sample(500, seed=0)
    elif options.synthetic:
        circuit, images = synthetic_circuit(options.num_states, options.side)
    else:
        circuit, images = digits_circuit(options.num_states, options.epochs)
    x = images.repeat(-(-options.images // len(images)), 1)[: options.images]
    observed = torch.arange(circuit.num_variables) < circuit.num_variables // 2
    cases = []
    for name, query in queries_of(circuit, observed).items():
        if options.only and name not in options.only:
            continue
        query(x[:8])
        for count in (max(1, options.images // 10), options.images):
            case = {"query": name, **measure(query, x[:count])}
            cases.append(case)
            if not options.json:
                growth = case["growth_bytes"]
                held = "unknown" if growth is None else f"{growth / 2**20:.0f} MiB"
                print(
                    f"{name:35s} {count:6d} images {case['images_per_second']:10.1f} a second, "
                    f"{held} beside an answer of {case['answer_bytes'] / 2**20:.0f} MiB",
                    flush=True,
                )
    if options.json:
        model = {
            "num_variables": circuit.num_variables,
            "num_parameters": circuit.num_parameters,
            "num_units": max(region.num_units for region in circuit.graph.regions),
        }
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads"
        print(json.dumps({"machine": machine, "model": model, "cases": cases}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
