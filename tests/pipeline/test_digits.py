"""The whole pipeline on real images: run, skip, redo, and survive kill -9 anywhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distpc.cli import main
from distpc.config import load_config
from distpc.pipeline.runner import Pipeline

SHORT = [
    "teacher.mae.num_epochs=2",
    "latents.num_clusters=32",
    "finetune.num_epochs=6",
    "finetune.checkpoint_every_seconds=0",
    "evaluate.num_pictures=9",
]
STAGES = [
    "shards",
    "index",
    "teacher",
    "features",
    "fit",
    "assign",
    "structure",
    "distill",
    "finetune",
    "evaluate",
]
CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"


def command(out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "distpc", "run", str(CONFIG), "--out", str(out), *overrides]


def finish(out: Path, *overrides: str) -> dict:
    result = subprocess.run(command(out, *overrides), capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "digits"
    return out, finish(out, *SHORT)


def test_report_and_files(finished: tuple[Path, dict]) -> None:
    out, report = finished
    keys = "config dataset seed num_parameters train_bpd valid_bpd test_bpd teacher latents stages"
    assert set(keys.split()) | {"peak_memory_bytes", "versions"} <= set(report)
    assert 1.9 < report["test_bpd"] < 2.3
    assert report["latents"]["num_clusters"] == 32
    assert list(report["stages"]) == STAGES
    assert not any(stage["skipped"] for stage in report["stages"].values())
    for name in ("model/circuit.json", "evaluate/samples.png", "evaluate/completions.png"):
        assert (out / name).is_file()
    assert any((out / "tb").rglob("events.out.tfevents.*"))


def test_the_same_command_again_skips_everything(finished: tuple[Path, dict]) -> None:
    out, before = finished
    report = finish(out, *SHORT)
    assert all(stage["skipped"] for stage in report["stages"].values())
    assert report["test_bpd"] == before["test_bpd"]


def test_evaluating_prints_the_figures(
    finished: tuple[Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = finished
    assert main(["evaluate", str(CONFIG), "--out", str(out), *SHORT]) == 0
    shown = capsys.readouterr().out
    assert f"test_bpd     {report['test_bpd']:.4f}" in shown
    assert f"report       {out / 'report.json'}" in shown


@pytest.mark.parametrize(
    ("override", "first_redone"),
    [
        ("parallel.num_ranks=1", None),
        ("latents.max_dead_fraction=0.5", None),
        ("structure.num_states=7", None),
        ("finetune.micro_batch_size=32", None),
        ("evaluate.num_pictures=4", "evaluate"),
        ("finetune.step_size=0.05", "finetune"),
        ("distill.emission_noise=0.2", "distill"),
        ("structure.pseudocount=0.5", "structure"),
        ("latents.num_rounds=7", "fit"),
        ("teacher.mae.width=32", "teacher"),
        ("data.samples_per_shard=100", "shards"),
        ("seed=1", "shards"),
    ],
)
def test_a_changed_field_redoes_what_depends_on_it(
    finished: tuple[Path, dict], override: str, first_redone: str | None
) -> None:
    out, _ = finished
    steps = Pipeline(load_config(CONFIG, [*SHORT, override]), out).steps()
    redone = [step.stage.name for step in steps if step.state != "done"]
    assert redone == ([] if first_redone is None else STAGES[STAGES.index(first_redone) :])


def test_dry_run_tells_what_would_run(finished: tuple[Path, dict]) -> None:
    out, report = finished
    result = subprocess.run(
        [*command(out, *SHORT, "seed=1"), "--dry-run"], capture_output=True, text=True, check=True
    )
    assert "seed: 1" in result.stdout and "bytes per rank" in result.stdout
    assert f"{report['num_parameters']:,} parameters" in result.stdout
    table = result.stdout.split("stages:")[1].splitlines()
    assert [line.split()[:2] for line in table if line.startswith("  ")] == [
        [name, "run"] for name in STAGES
    ]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {seconds} s")


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def started_without(finished: tuple[Path, dict], out: Path, stages: list[str]) -> subprocess.Popen:
    """A run in `out` that has everything of the finished one but `stages`."""
    subprocess.run(["cp", "-r", str(finished[0]), str(out)], check=True)
    for stage in stages:
        subprocess.run(["rm", "-r", str(out / stage)], check=True)
    log = (out / "log.txt").open("w")
    return subprocess.Popen(command(out, *SHORT), stdout=log, stderr=log)


@pytest.fixture
def cleanup() -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def ranks_of(driver: psutil.Process) -> list[psutil.Process]:
    return [p for p in descendants(driver) if "distpc.parallel.rank" in " ".join(p.cmdline())]


@pytest.mark.parametrize("victim", ["driver", "rank"])
def test_kill_in_the_middle_of_finetuning(
    finished: tuple[Path, dict], tmp_path: Path, cleanup: list, victim: str
) -> None:
    out = tmp_path / "digits"
    process = started_without(finished, out, ["finetune", "evaluate"])
    cleanup.append(process)
    driver = psutil.Process(process.pid)
    checkpoints = out / "finetune" / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and list(checkpoints.glob("*")), 120, "checkpoint")
    family = descendants(driver)
    target = driver if victim == "driver" else ranks_of(driver)[-1]
    os.kill(target.pid, signal.SIGKILL)
    assert process.wait(timeout=30) != 0
    wait_for(lambda: not alive(family), 30, "end of all processes of the dead run")
    assert finish(out, *SHORT)["test_bpd"] == pytest.approx(finished[1]["test_bpd"], abs=1e-4)


def test_kill_a_ray_actor_and_the_same_run_finishes(
    finished: tuple[Path, dict], tmp_path: Path, cleanup: list
) -> None:
    out = tmp_path / "digits"
    process = started_without(finished, out, STAGES[STAGES.index("features") :])
    cleanup.append(process)
    driver = psutil.Process(process.pid)

    def actors() -> list[psutil.Process]:
        found = descendants(driver)
        return [p for p in found if p.is_running() and p.name().startswith("ray::_Host")]

    victims = wait_for(actors, 120, "Ray actor")
    os.kill(victims[0].pid, signal.SIGKILL)  # type: ignore[index]
    assert process.wait(timeout=400) == 0, (out / "log.txt").read_text()[-3000:]
    report = json.loads((out / "report.json").read_text())
    assert report["test_bpd"] == pytest.approx(finished[1]["test_bpd"], abs=1e-4)
