"""Peak memory of training above what the process held before there was a circuit."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from circuit_bench.cases import Case
from circuit_bench.ours import Ours

STEPS = 2
TOOL = Path(__file__).parent.parent / "bench_circuit.py"


def peak_bytes(case: Case, device: str, fused: bool, threads: int) -> int:
    """Of a training run in a process of its own."""
    command = [sys.executable, str(TOOL), "--device", device, "--threads", str(threads)]
    command += ["--measure-memory", str(case), *(["--fused"] if fused else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {case} was not measured: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout)["peak_bytes"])


def measure(case: Case, device: str, fused: bool) -> int:
    """In this process: bytes at the peak of some steps, above those before there was a circuit."""
    # What torch's libraries allocate once is no part of the circuit's training.
    Ours(Case(case.structure, 4, 4, 4), device).step()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        idle = torch.cuda.memory_allocated()
        ours = Ours(case, device, fused)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            ours.step()
        return torch.cuda.max_memory_allocated() - idle
    idle = _status("VmRSS")
    ours = Ours(case, device, fused)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Making random parameters is no training: start the high-water mark anew.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        ours.step()
    return _status("VmHWM") - idle


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) * 1024
