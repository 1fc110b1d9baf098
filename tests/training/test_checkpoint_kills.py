"""`kill -9` at random moments: the previous or the new checkpoint loads, never a mixture."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import prepare, variant

from distpc.artifacts.stage import StageContext
from distpc.parallel.launch import run_ranks
from distpc.training import finetune
from distpc.training.checkpoint import Checkpoints

HERE = Path(__file__).parent
TRIALS = 20


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}


def test_writers_killed_at_random_leave_the_previous_or_the_new(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    ended = subprocess.run(
        [sys.executable, HERE / "kill_writers.py", tmp_path, str(TRIALS), str(seed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    trials: list[dict[str, Any]] = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(trials) == TRIALS
    for trial in trials:
        # The new one may be there before its writer could tell of it.
        assert trial["found"] in (trial["told"], trial["told"] + 1), (seed, trial)
        assert trial["values"] == ([float(trial["found"])] if trial["found"] else []), seed
        assert not trial["damaged"], (seed, trial)
    assert trials[-1]["found"] > 5, "the writers got nowhere"
    assert sum(trial["drafts"] > 0 for trial in trials) > TRIALS // 2, "kills met no writing"


@pytest.mark.slow
def test_training_killed_at_random_resumes_to_the_same_statistics(tmp_path: Path) -> None:
    """A rank or the launcher is killed; what loads is what an undisturbed run saved then."""
    base = prepare(
        tmp_path / "run",
        num_epochs=20,
        batch_size=101,
        evaluate_every_epochs=20,
        checkpoint_every_seconds=0.0,
        keep_checkpoints=1000,
    )
    whole, killed = variant(base, "whole", zero_stage=2), variant(base, "killed", zero_stage=2)
    logs = {"threads_per_rank": 1, "log_folder": tmp_path / "logs"}
    run_ranks("runs:train_each", {"contexts": [whole.to_json()]}, num_ranks=2, **logs)
    chance, step = random.Random(), 0
    for _ in range(TRIALS):
        kill_training(killed, step, chance)
        found = saved(killed).newest()
        assert found is not None and found.facts.step >= step
        step = found.facts.step
        expected = saved(whole).at(step).statistics()
        for name, tensor in found.statistics().items():
            assert torch.equal(tensor, expected[name]), (step, name)
    assert step > 0


def saved(ctx: StageContext) -> Checkpoints:
    return Checkpoints(ctx.out / finetune.CHECKPOINTS, finetune.identity_of(ctx))


def kill_training(ctx: StageContext, step: int, chance: random.Random) -> None:
    """Start or resume training, and kill a part of it some moments after a new checkpoint."""
    file = ctx.out.parent / "context.json"
    file.write_text(json.dumps(ctx.to_json()))
    driver = subprocess.Popen(
        [sys.executable, HERE / "runs.py", file],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not any(path.name > f"step-{step:08d}" for path in saved(ctx).paths()):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.3))
    ranks = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    os.kill(chance.choice([driver.pid, *map(int, ranks)]), signal.SIGKILL)
    driver.wait(timeout=120)
    # Ranks end with their launcher, a moment later.
    while any(Path(f"/proc/{rank}/root").exists() for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.05)
