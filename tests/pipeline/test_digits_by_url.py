"""The whole pipeline on digits, its shards and results in an object store, killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distpc.artifacts.place import Place

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
SHORT = [
    "teacher.mae.num_epochs=1",
    "latents.num_clusters=16",
    "latents.max_dead_fraction=0.9",
    "finetune.num_epochs=2",
    "evaluate.num_pictures=4",
]
FIGURES = ("train_bpd", "valid_bpd", "test_bpd", "num_parameters", "latents")


def command(stage: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "distpc", stage, str(CONFIG), *SHORT, "--out", str(out), *options]


def finish(out: Path, *options: str) -> dict:
    result = subprocess.run(command("run", out, *options), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((out / "report.json").read_text())


def figures(report: dict) -> dict:
    return {name: report[name] for name in FIGURES}


def kill_when(path: Path, out: Path, *options: str) -> None:
    """Start a run and kill its driver as soon as `path` is there."""
    with (out.parent / "log.txt").open("w") as log:
        process = subprocess.Popen(command("run", out, *options), stdout=log, stderr=log)
        family = [psutil.Process(process.pid)]
        while not path.exists():
            assert process.poll() is None, (out.parent / "log.txt").read_text()[-3000:]
            time.sleep(0.05)
        family = family[0].children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 60
    while any(child.is_running() and child.status() != "zombie" for child in family):
        assert time.monotonic() < deadline, "processes of the dead run are left"
        time.sleep(0.1)


@pytest.mark.slow
def test_by_url_and_locally_are_the_same(bucket: str, tmp_path: Path) -> None:
    local = figures(finish(tmp_path / "local"))
    place = Place.of(f"{bucket}/shards")
    for path in (tmp_path / "local" / "shards").iterdir():
        place.put(path.name, path)
    options = (
        f"data.source={{kind: shards, url: '{place}'}}",
        f"artifacts.url={bucket}/stages",
        "artifacts.cache_bytes=600000",
    )
    out = tmp_path / "by-url"
    kill_when(out / "features" / ".attempt.json", out, *options)
    kill_when(out / "finetune" / ".attempt.json", out, *options)
    report = finish(out, *options)
    assert figures(report) == local
    assert not list(out.rglob("*.tar"))
    assert report["stages"]["features"]["skipped"] and not report["stages"]["evaluate"]["skipped"]
    again = finish(tmp_path / "again", *options, "--reuse", f"{bucket}/stages")
    assert figures(again) == local
    assert all(
        stage["taken_from"].startswith(f"{bucket}/stages/{name}/")
        for name, stage in again["stages"].items()
    )
