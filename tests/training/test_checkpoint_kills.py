"""`kill -9` at random moments: the previous or the new checkpoint loads, never a mixture."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

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
