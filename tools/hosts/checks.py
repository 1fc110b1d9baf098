"""Waiting, comparing, and saying what held."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distpc.artifacts.files import read_json

BPD_TOLERANCE = 1e-4
STATISTICS_TOLERANCE = 1e-5
HELD = "held"
"""A file in the folder of an undisturbed run that passed its checks."""
_BEGUN = time.monotonic()


class Failed(Exception):
    """Something did not hold."""


def check(holds: bool, what: str, detail: str = "") -> None:
    """Say whether `what` holds.

    Raises:
        Failed: it does not.
    """
    text = f"{what}: {detail}" if detail else what
    if not holds:
        raise Failed(text)
    print(f"[hosts] {time.monotonic() - _BEGUN:5.0f} s  ok: {text}", flush=True)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until `condition` holds.

    Raises:
        Failed: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.05)


def wait_for_ends(started: Mapping[str, subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait until all of `started`, by host, end well.

    Raises:
        Failed: one fails, or runs longer than `seconds`.
    """

    def all_ended() -> bool:
        codes = {name: process.poll() for name, process in started.items()}
        failed = {name: code for name, code in codes.items() if code not in (None, 0)}
        if failed:
            raise Failed(f"exit status by host: {failed}")
        return None not in codes.values()

    wait_for(all_ended, seconds, f"the end of what runs on {', '.join(started)}")


def fresh(run: Path) -> Path:
    """A run's folder without what an earlier call of this tool left there."""
    shutil.rmtree(run, ignore_errors=True)
    return run


def read_report(run: Path) -> dict[str, Any]:
    """report.json of a finished run."""
    report: dict[str, Any] = read_json(run / "report.json")
    return report


def resumed_at_step(run: Path) -> int:
    """The step of the checkpoint that the last attempt at fine-tuning went on from; 0: none."""
    return int(read_json(run / "finetune" / "training.json")["resumed_at_step"])


def has_trained(run: Path) -> bool:
    """Whether fine-tuning has a checkpoint, whole, of a later step than the first."""
    return any((run / "finetune" / "checkpoints").glob("step-*[1-9]*"))


def same_result(run: Path, whole: Path) -> None:
    """Compare a disturbed run with the undisturbed one: figures and statistics.

    Raises:
        Failed: they differ.
    """
    from safetensors.torch import load_file

    bpd = [read_report(folder)["test_bpd"] for folder in (run, whole)]
    worst = 0.0
    models = [folder / "finetune" / "model" for folder in (run, whole)]
    files = sorted(path.name for path in models[1].glob("*.safetensors"))
    check(bool(files), "models were written", ", ".join(files))
    for file in files:
        found, expected = (load_file(model / file) for model in models)
        check(found.keys() == expected.keys(), "both models hold the same tensors")
        for name, tensor in expected.items():
            scale = float(tensor.abs().max())
            difference = float((found[name].double() - tensor.double()).abs().max())
            worst = max(worst, difference / scale if scale else difference)
    check(
        abs(bpd[0] - bpd[1]) <= BPD_TOLERANCE and worst <= STATISTICS_TOLERANCE,
        "the same result as undisturbed",
        f"test_bpd {bpd[0]:.7f} and {bpd[1]:.7f}; statistics differ by {worst:.1e} of the largest",
    )
