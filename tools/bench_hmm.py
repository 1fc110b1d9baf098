#!/usr/bin/env python
"""Training of hidden Markov models: tokens a second, against peers and against matrix products.

    pip install hmmlearn
    python tools/bench_hmm.py --json table.json --cases 256:8192:64 1024:8192:64
    python tools/bench_hmm.py --json table.json --dynamax-python /path/to/other/env/bin/python
    python tools/bench_hmm.py --memory 65536:1024:32:8:monarch

A case is STATES:VOCABULARY:LENGTH[:BATCH[:LAYER]]. All sides take turns; times are medians. A step
is an E-step and its update: ours of the scan, and of the compiled circuit without it. Peers see
--peer-batch sequences, as a step of theirs takes long; a side's figure is its own tokens over its
own time. `fraction_of_products` is the time of the products that nobody can do without, over ours.
--memory trains ten steps of one case alone and prints its peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from circuit_bench.clock import medians
from hmm_bench.ours import Ours, Products
from hmm_bench.peers import Cirkit, Dynamax, HmmLearn, version

STEPS = 10


@dataclass(frozen=True)
class Case:
    """What is trained: H states, C tokens, length T, batch B."""

    states: int
    vocabulary: int
    length: int
    batch: int = 64
    layer: str = "cp"

    @classmethod
    def parse(cls, text: str) -> Case:
        """From STATES:VOCABULARY:LENGTH[:BATCH[:LAYER]]."""
        parts = text.split(":")
        layer = parts.pop() if not parts[-1].isdigit() else "cp"
        if not 3 <= len(parts) <= 4 or layer not in ("cp", "monarch"):
            raise argparse.ArgumentTypeError(f"{text}: STATES:VOCABULARY:LENGTH[:BATCH[:LAYER]]")
        return cls(*map(int, parts), layer=layer)  # type: ignore[misc]

    def texts(self, batch: int) -> torch.Tensor:
        """(batch, T) random tokens, every token of the vocabulary possible."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocabulary, (batch, self.length), generator=generator)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    x, device = case.texts(case.batch), options.device
    sizes = case.states, case.vocabulary, case.layer
    ours = Ours(x, *sizes, device=device)
    compiled = Ours(x, *sizes, scanned=False, device=device)
    nats = ours.step(), compiled.step()
    if abs(nats[0] - nats[1]) > 1e-3 * abs(nats[1]):
        raise RuntimeError(f"the scan and the compiled circuit differ: {nats}")
    works: dict[str, Callable[[], object]] = {"ours": ours.step, "compiled": compiled.step}
    if case.layer == "cp":
        works["products"] = Products(case.batch, case.length, case.states, device).run
    few = case.texts(options.peer_batch).numpy()
    peers: dict[str, HmmLearn | Dynamax | Cirkit] = {}
    threads = torch.get_num_threads()
    if "hmmlearn" in options.peers:
        peers["hmmlearn"] = HmmLearn(few, case.states, case.vocabulary, threads)
    if "dynamax" in options.peers and options.dynamax_python:
        python = options.dynamax_python
        peers["dynamax"] = Dynamax(few, case.states, case.vocabulary, threads, python)
    if "libcirkit" in options.peers:
        if table_bytes(case) > options.cirkit_bytes:
            print(f"libcirkit: {table_bytes(case):,} bytes of tables, left out", file=sys.stderr)
        else:
            peers["libcirkit"] = Cirkit(few, compiled.circuit, device)
    works |= {name: peer.step for name, peer in peers.items()}
    try:
        taken = medians(works, device, options.rounds, options.seconds)
    finally:
        for peer in peers.values():
            peer.close()
    tokens = case.batch * case.length
    row: dict[str, Any] = {**case.__dict__, "step_ms": {}, "tokens_per_second": {}}
    for name, seconds in taken.items():
        row["step_ms"][name] = round(1e3 * seconds, 2)
        seen = len(few) * case.length if name in peers else tokens
        row["tokens_per_second"][name] = round(seen / seconds)
    rates = row["tokens_per_second"]
    if "products" in taken:
        row["fraction_of_products"] = round(taken["products"] / taken["ours"], 3)
    row["scan_over_compiled"] = round(taken["compiled"] / taken["ours"], 2)
    if peers:
        row["ratio_to_fastest_peer"] = round(rates["ours"] / max(rates[p] for p in peers), 1)
        row["peer_sequences"] = len(few)
    return row


def table_bytes(case: Case) -> int:
    """Bytes of libcirkit's emission tables with gradients and Adam's moments, were they untied."""
    return 4 * 4 * case.length * case.states * case.vocabulary


def peak(case: Case, device: str) -> dict[str, Any]:
    """Ten training steps, and the most memory that they took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ours = Ours(case.texts(case.batch), case.states, case.vocabulary, case.layer, device=device)
    begun = time.perf_counter()
    nats = [ours.step() for _ in range(STEPS)]
    found = {
        **case.__dict__,
        "num_parameters": ours.circuit.num_parameters,
        "seconds_per_step": round((time.perf_counter() - begun) / STEPS, 3),
        "first_nats": round(nats[0], 3),
        "last_nats": round(nats[-1], 3),
        "resident_before_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device != "cpu":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, help="the table's file (default: print)")
    defaults = [Case(256, 8192, 64), Case(1024, 8192, 64)]
    add("--cases", type=Case.parse, nargs="+", default=defaults, metavar="CASE")
    add("--memory", type=Case.parse, metavar="CASE", help="ten steps of one case, peak memory")
    add("--device", default="cpu")
    add("--threads", type=int, default=os.cpu_count())
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=60.0, help="per case, once three rounds are done")
    names = ["hmmlearn", "dynamax", "libcirkit"]
    add("--peers", nargs="*", default=names[:2], choices=names)
    add("--cirkit-bytes", type=float, default=4e9, help="largest tables of libcirkit (default 4e9)")
    add("--peer-batch", type=int, default=4, help="sequences of a peer's step (default 4)")
    add("--dynamax-python", help="python of an environment with dynamax")
    return parser.parse_args()


def main() -> None:
    """Run the cases and write the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(peak(options.memory, options.device), indent=2))
        return
    rows = []
    for case in options.cases:
        print(case, file=sys.stderr, flush=True)
        rows.append(measure(case, options))
    table = {
        "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
        "threads": options.threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "hmmlearn": version("hmmlearn"),
        "dynamax": version("dynamax", options.dynamax_python or sys.executable),
        "cases": rows,
    }
    text = json.dumps(table, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
