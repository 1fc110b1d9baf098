#!/usr/bin/env python
"""Training steps of the circuit engine: against libcirkit, and against plain matrix products.

    pip install -e '.[bench]'
    python tools/bench_circuit.py --json table.json                  every case (an hour)
    python tools/bench_circuit.py --json table.json --cases hclt:256:64 hmm:32:256
    python tools/bench_circuit.py --quick                            under a minute

    pip install pyjuice==2.6.3                                       on a GPU the peer is PyJuice
    python tools/bench_circuit.py --device cuda --json gpu.json      the cases that are not there

A case is STRUCTURE:VARIABLES:STATES[:BATCH[:DTYPE]]. Cases are added to the file one by one (a case
that is there already is replaced), so that several short commands make one table.

Both sides, and the machine's own products, take turns; times are medians. A step is forward,
backward and update. `gflops` counts 6 x batch x K x K for a dense block and nothing else, over the
time of forward and backward (likelihoods, flows, statistics); `gemm_gflops` is what batched matmuls
of the same shapes reach when there is nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from circuit_bench import memory
from circuit_bench.cases import Case
from circuit_bench.clock import medians
from circuit_bench.gpu_table import run_gpu
from circuit_bench.ours import Ours
from circuit_bench.peer import MAX_SECONDS, NAME, Peer, Setting, best_setting, check_equal
from circuit_bench.rate import Products

CASES = [
    *(Case("hclt", v, k) for k in (64, 256, 512) for v in (256, 784)),
    *(Case("hmm", 32, k) for k in (256, 1024)),
    *(Case("hclt", 256, k, dtype="bfloat16") for k in (256, 512)),
]
QUICK = [Case("hclt", 64, 64, 128), Case("hmm", 8, 64, 64)]
ALONE = {("hclt", 784, 512)}
"""Cases that are ours alone."""
PEER_VARIABLES = {"hclt": 256, "hmm": 32}
"""Where the peer's best setting is found, once for each K."""


class Bench:
    """The table, and how its rows are measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = options.device
        self.table: dict[str, Any] = {"machine": machine(options.device), "cases": []}
        if options.json and options.json.exists():
            self.table["cases"] = json.loads(options.json.read_text())["cases"]
        self.settings: dict[tuple[str, int], tuple[Setting | None, str]] = {}

    def run(self, case: Case) -> None:
        """Measure a case and add its row."""
        print(case, file=sys.stderr, flush=True)
        circuit = case.circuit().to(self.device)
        ours = Ours(case, self.device)
        peer, setting, note = self._peer(case, circuit)
        works = {
            "step": ours.step,
            "pass": ours.passes,
            "gemm": Products(case, circuit, self.device).run,
        }
        if peer is not None:
            works["peer"] = peer.step
        budget = 5.0 if self.options.quick else self.options.seconds
        taken = medians(works, self.device, self.options.rounds, budget)
        parameters = circuit.num_parameters
        del ours, peer, works, circuit
        row = self._row(case, taken, setting, note)
        for key, fused in (("", False), ("_fused", True)):
            peak = memory.peak_bytes(case, self.device, fused, self.options.threads)
            row[f"peak_bytes_per_parameter{key}"] = round(peak / parameters, 2)
        tensor = 4 * case.batch * case.num_variables * case.num_states
        row["message_bytes_per_parameter"] = round(tensor / parameters, 2)
        self._add(row)

    def _peer(self, case: Case, circuit: Any) -> tuple[Peer | None, Setting | None, str]:
        """The peer in its best setting; or None and the reason."""
        if (case.structure, case.num_variables, case.num_states) in ALONE:
            return None, None, "ours alone"
        if case.dtype != "float32":
            return None, None, f"{NAME} has no {case.dtype} products"
        key = case.structure, case.num_states
        if key not in self.settings:
            self.settings[key] = self._setting(case)
        setting, note = self.settings[key]
        if setting is None:
            return None, None, note
        peer = Peer(case, circuit, setting, self.device)
        check_equal(circuit, peer, case.batches(1, self.device)[0])
        taken = medians({"peer": peer.step}, self.device, 1, 0.0)["peer"]
        if taken > MAX_SECONDS:
            return None, setting, f"{NAME}'s step takes {taken:.0f} s"
        return peer, setting, ""

    def _setting(self, case: Case) -> tuple[Setting | None, str]:
        if self.options.peer_setting:
            return Setting.parse(self.options.peer_setting), ""
        try:
            import cirkit  # noqa: F401
        except ImportError:
            return None, f"{NAME} is not installed"
        if self.options.quick:
            return Setting("adam"), ""
        variables = PEER_VARIABLES[case.structure]
        small = Case(case.structure, variables, case.num_states, case.batch, case.dtype)
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        return best_setting(small, small.circuit().to(self.device), self.device, say)

    def _row(
        self, case: Case, taken: dict[str, float], setting: Setting | None, note: str
    ) -> dict[str, Any]:
        gflops, gemm = case.gflop() / taken["pass"], case.gflop() / taken["gemm"]
        theirs = taken.get("peer")
        return {
            "structure": case.structure,
            "num_variables": case.num_variables,
            "num_states": case.num_states,
            "batch": case.batch,
            "dtype": case.dtype,
            "step_ms": round(1e3 * taken["step"], 3),
            "gflops": round(gflops, 2),
            "gemm_gflops": round(gemm, 2),
            "fraction_of_gemm": round(gflops / gemm, 3),
            "peer": NAME,
            "peer_step_ms": None if theirs is None else round(1e3 * theirs, 3),
            "ratio_to_peer": None if theirs is None else round(theirs / taken["step"], 2),
            "peer_setting": None if setting is None else str(setting),
            "peer_note": note or None,
            "pass_ms": round(1e3 * taken["pass"], 3),
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _add(self, row: dict[str, Any]) -> None:
        key = ("structure", "num_variables", "num_states", "batch", "dtype")
        others = [old for old in self.table["cases"] if any(old[k] != row[k] for k in key)]
        self.table["cases"] = [*others, row]
        if self.options.json:
            self.options.json.write_text(json.dumps(self.table, indent=2) + "\n")


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    names = [line for line in _cpu_info() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, nargs="?", help="the table's file; without a name: print it")
    add("--quick", action="store_true", help="small cases, under a minute")
    add("--cases", nargs="+", metavar="CASE", default=[])
    add("--device", default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of every case")
    add("--threads", type=int, default=os.cpu_count())
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=120.0, help="per case, once three rounds are done")
    add("--vocabulary", type=int, help="on a GPU: words of hmm cases (33,279)")
    add("--batch", type=int, help="of cases that do not say (256; on a GPU 512)")
    add("--limit", type=float, default=60.0, help="seconds a case may take on a GPU")
    add("--peer-limit", type=float, default=40.0, help="of those, to compile and warm up the peer")
    add("--no-peer", action="store_true", help="our side alone")
    add("--plain", action="store_true", help="on a GPU: the ordinary step instead of the fused one")
    add("--again", action="store_true", help="on a GPU: measure cases anew that have their row")
    add("--gpu-table", action="store_true", help="the table of a GPU, whatever the device")
    add("--peer-setting", help="such as em+fold+optimize: take it, look for no better one")
    add("--plot", type=Path, help="draw the table (of --json) into this picture")
    add("--measure-memory", type=Case.parse, help=argparse.SUPPRESS)
    add("--fused", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the cases, write the table, draw it."""
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.measure_memory:
        case = options.measure_memory
        peak = memory.measure(case, options.device, options.fused)
        print(json.dumps({"peak_bytes": peak}))
        return
    if options.device != "cpu" or options.gpu_table:
        run_gpu(options)
        return
    bench = Bench(options)
    named = [Case.parse(text, options.batch) for text in options.cases]
    cases = named or (QUICK if options.quick else CASES)
    if options.plot and not options.cases and bench.table["cases"]:
        cases = []
    for case in cases:
        if options.dtype:
            case = Case.parse(str(case).rsplit(":", 1)[0] + ":" + options.dtype)
        bench.run(case)
    if not options.json:
        print(json.dumps(bench.table, indent=2))
    if options.plot:
        from circuit_bench.plot import draw

        draw(bench.table["cases"], options.plot)


if __name__ == "__main__":
    main()
