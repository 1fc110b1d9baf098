"""The table of a GPU: cases in the order of what they tell, added to a file one by one."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from circuit_bench import gpu_turn
from circuit_bench.cases import Case
from circuit_bench.ceilings import ceilings
from circuit_bench.gpu_bench import GpuCase, Row, key_of
from circuit_bench.gpu_clock import free

CASES = [
    "hclt:768:1024",
    "hmm:32:4096",
    "hclt:768:256",
    "hmm:32:1024",
    "hclt:768:64",
    "hclt:768:512",
    "hmm:32:2048",
    "hmm:32:8192",
    "hclt:3072:256",
    "hclt:768:2048",
    "hclt:3072:512",
    "hclt:3072:1024",
    "hclt:3072:2048",
]
QUICK = ["hclt:16:16:32", "hmm:4:16:32"]
BATCH, DTYPE, VOCABULARY = 512, "bfloat16", 33_279
"""What cases leave open."""
TIMING_SECONDS = 6.0


def run_gpu(options: argparse.Namespace) -> None:
    """Measure the cases that have no row yet; see `bench_circuit.py --help`."""
    table = Table(options.json)
    words = options.vocabulary or (100 if options.quick else VOCABULARY)
    sizes = options.batch or BATCH, options.dtype or DTYPE, words
    names = options.cases or (QUICK if options.quick else CASES)
    found: dict[str, float] = {}
    limits = {"case": options.limit, "peer": options.peer_limit, "timing": TIMING_SECONDS}
    for name in names:
        case = Case.parse(name, *sizes)
        if "step_ms" in (table.row_of(case) or {}) and not options.again:
            say(f"{case}: has its row")
            continue
        say(str(case))
        measured = GpuCase(case, options.device, found, limits, options.rounds, not options.plain)
        if not options.no_peer:
            measured.prepare()
        gpu_turn.take()
        if not found:
            found.update(ceilings(options.device))
            free(options.device)
            table.begin({**machine(options.device), "ceilings": found})
            say(f"ceilings: {found}")
        measured.run(table.add, with_peer=not options.no_peer)
        gpu_turn.give()
        say(f"  {summary(measured.row)}")
    if not options.json:
        print(json.dumps(table.content, indent=2))


class Table:
    """The rows and what they were measured on, in memory and in a file.

    Other processes may add theirs: the file is read again before it is written, and who writes has
    the turn on the GPU.

    Args:
        path: of the file, whose rows are kept; None: in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": {}, "cases": []}
        self._read()

    def begin(self, about: dict[str, Any]) -> None:
        """Note the machine, with the ceilings of this run; those of earlier runs stay."""
        self._read()
        runs = self.content["machine"].get("runs", [])
        self.content["machine"] = {**about, "runs": [*runs, about["ceilings"]]}
        self._write()

    def row_of(self, case: Case) -> Row | None:
        """The row that a case has."""
        key = key_of(case).items()
        return next((row for row in self.content["cases"] if key <= row.items()), None)

    def add(self, row: Row) -> None:
        """Add a row, or replace the one of its case."""
        key = [(k, row[k]) for k in ("structure", "num_variables", "num_states", "batch", "dtype")]
        self._read()
        rows = self.content["cases"]
        others = [old for old in rows if any(old[k] != value for k, value in key)]
        self.content["cases"] = [*others, dict(row)]
        self._write()

    def _read(self) -> None:
        if self.path and self.path.exists():
            self.content = json.loads(self.path.read_text())

    def _write(self) -> None:
        if self.path:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.content, indent=2) + "\n")
            new.replace(self.path)


def machine(device: str) -> dict[str, Any]:
    """What is measured on."""
    about: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        about |= {"device": properties.name, "memory_bytes": properties.total_memory}
    return about


def summary(row: Row) -> str:
    """One line about a row."""
    keys = (
        "step_ms peer_step_ms ratio_to_peer likelihood_error tflops fraction_of_gemm "
        "fraction_of_bandwidth peak_bytes peer_peak_bytes peer_compile_seconds peer_warm_seconds "
        "warm_seconds case_seconds peer_note note"
    )
    return " ".join(f"{key}={row[key]}" for key in keys.split() if row.get(key) is not None)


def say(line: str) -> None:
    """To the terminal, at once."""
    print(line, file=sys.stderr, flush=True)
