#!/usr/bin/env python3
"""Kill parts of a cluster while features, k-means and assignment run; nothing may come of it.

    python tools/chaos.py --runs 30 --seed 0
    python tools/chaos.py --runs 5 --seed 10 --log chaos.jsonl     runs 10 .. 14, added to the log

A Ray cluster of several nodes runs on this machine. In every run one to three of these happen at
random moments: a worker process, a node's raylet or the driver is killed (SIGKILL). When the driver
is gone, the same command is given again. Every output must then be what an undisturbed run leaves,
byte for byte, and no finished shard may have been computed twice (one that was in flight when
something was killed may). Run S + i depends on seed S + i alone, so runs may be spread over calls.
Needs psutil: pip install -e '.[dev]'.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from chaos_runs.nodes import Nodes, environment
from chaos_runs.work import NUM_WORKERS, STAGES, Driver, Watch, digests, fresh, prepare

KINDS = ("actor", "actor", "raylet", "driver")
_LOOK_SECONDS = 0.02
_MOST_SECONDS = 400.0
_FLIGHT_SECONDS = 3.0
"""Between a shard's publication and the driver's hearing of it, at most (the machine is busy)."""


@dataclass(frozen=True)
class Kill:
    """Something to kill in a stage: so many seconds after it has begun, and not before so many
    shards or rounds."""

    kind: str
    stage: str
    seconds: float
    steps: int


def main() -> int:
    """0 when every run ended identical."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30, help="(default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (default 0)")
    parser.add_argument("--log", type=Path, help="JSON lines, one a run, are appended to it")
    parser.add_argument("--folder", type=Path, help="for runs; the reference in it is used again")
    parser.add_argument("--nodes", type=int, default=3, help="worker nodes (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-runs-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        environment(PYTHONPATH=python_path())
        base = prepare(folder)
        good = 0
        with Nodes(options.nodes) as nodes:
            expected, size = reference(folder, base, nodes)
            for seed in range(options.seed, options.seed + options.runs):
                facts = disturbed(folder, base, nodes, seed, expected, size)
                line = json.dumps({"seed": seed, **facts})
                print(line, flush=True)
                if options.log is not None:
                    with options.log.open("a") as log:
                        log.write(line + "\n")
                good += facts["good"]
    print(f"{good} of {options.runs} runs ended identical", file=sys.stderr)
    return 0 if good == options.runs else 1


def python_path() -> str:
    """PYTHONPATH under which the cluster's processes find this source tree."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def reference(folder: Path, base: Path, nodes: Nodes) -> tuple[dict[str, str], dict[str, Any]]:
    """Digests of an undisturbed run, and seconds and steps of its stages; made once a folder."""
    kept = folder / "reference.json"
    if not kept.exists():
        run = folder / "reference"
        fresh(base, run)
        watch, driver = Watch(run), Driver(folder, run, nodes.address)
        while driver.process.poll() is None:
            watch.look()
            time.sleep(_LOOK_SECONDS)
        watch.look()
        if driver.process.returncode != 0:
            raise SystemExit(f"the undisturbed run failed: {driver.last_words()}")
        size = {stage: (watch.seconds()[stage], watch.steps(stage)) for stage in STAGES}
        kept.write_text(json.dumps([digests(run), size]))
    expected, size = json.loads(kept.read_text())
    return expected, size


def drawn_kills(random: Random, size: dict[str, Any]) -> list[Kill]:
    """One to three kills, in the order in which they fall due.

    Most of a short stage is the start of workers: two of three kills wait for work to be done.
    """
    kills = []
    for _ in range(random.randint(1, 3)):
        stage = random.choice(STAGES)
        seconds, steps = size[stage]
        by_steps = random.random() < 2 / 3
        moment = random.random()
        kills.append(
            Kill(
                random.choice(KINDS),
                stage,
                0.0 if by_steps else moment * seconds,
                int(moment * steps) if by_steps else 0,
            )
        )
    return sorted(kills, key=lambda kill: (STAGES.index(kill.stage), kill.steps, kill.seconds))


def disturbed(
    folder: Path,
    base: Path,
    nodes: Nodes,
    seed: int,
    expected: dict[str, str],
    size: dict[str, Any],
) -> dict[str, Any]:
    """One run with its kills, driven until the command ends well; the facts for the log."""
    random = Random(seed)
    pending = drawn_kills(random, size)
    run = folder / f"run-{seed}"
    fresh(base, run)
    watch = Watch(run)
    strikes: list[dict[str, Any]] = []
    exits: list[str] = []
    begun = time.monotonic()
    driver = Driver(folder, run, nodes.address)
    try:
        while time.monotonic() < begun + _MOST_SECONDS:
            watch.look()
            nodes.mend()
            if pending and is_due(pending[0], watch):
                strike(pending, nodes, driver, watch, random, strikes)
            if driver.process.poll() is not None:
                if driver.process.returncode == 0:
                    break
                code = driver.process.returncode
                exits.append(f"{code}: {driver.last_words()}" if code != -9 else "-9")
                if not nodes.is_alive():
                    nodes.stop()
                    nodes.start()
                driver = Driver(folder, run, nodes.address)
            time.sleep(_LOOK_SECONDS)
    finally:
        driver.end()
    watch.look()
    if not nodes.is_alive():
        nodes.stop()
        nodes.start()
    return {**verdict(run, watch, strikes, expected, driver.process.returncode), "exits": exits,
            "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip


def is_due(kill: Kill, watch: Watch) -> bool:
    """Whether its moment has come, or has been missed because the stage is over."""
    begun = watch.started.get(kill.stage)
    if begun is None:
        return False
    if kill.stage in watch.finished:
        return True
    return time.monotonic() >= begun + kill.seconds and watch.steps(kill.stage) >= kill.steps


def strike(
    pending: list[Kill],
    nodes: Nodes,
    driver: Driver,
    watch: Watch,
    random: Random,
    strikes: list[dict[str, Any]],
) -> None:
    """Carry out the first of `pending`; one without a target stays until it has one."""
    kill = pending[0]
    if kill.kind == "driver":
        target: str | None = "driver"
        if driver.process.poll() is None:
            driver.process.kill()
            driver.process.wait()
        else:
            target = None
    else:
        target = (nodes.kill_actor if kill.kind == "actor" else nodes.kill_raylet)(random)
    if target is None:
        return
    pending.pop(0)
    now = time.monotonic()
    running = [stage for stage in STAGES if stage in watch.started]
    done = [stage for stage in STAGES if stage in watch.finished]
    strikes.append(
        {
            "target": target,
            "drawn_for": kill.stage,
            "during": running[-1] if running and running[-1] not in done else "between",
            "second": round(now - watch.started[kill.stage], 2),
            "steps": watch.steps(kill.stage),
            "at": now,
        }
    )


def verdict(
    run: Path,
    watch: Watch,
    strikes: list[dict[str, Any]],
    expected: dict[str, str],
    code: int | None,
) -> dict[str, Any]:
    """Whether the run ended well, alike, and without double work."""
    found = digests(run) if code == 0 else {}
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    moments = [strike.pop("at") for strike in strikes]
    twice, in_flight = [], []
    for shard, seen in watch.published.items():
        times = sorted(seen.values())
        for first in times[:-1]:
            lost = any(0 <= moment - first <= _FLIGHT_SECONDS for moment in moments)
            late = any(-_FLIGHT_SECONDS <= moment - first <= 0 for moment in moments)
            (in_flight if lost or late else twice).append(shard)
    excess = len(in_flight) > NUM_WORKERS * len(strikes)
    return {
        "good": code == 0 and not differing and not twice and not excess,
        "finished": code == 0,
        "strikes": strikes,
        "differing": differing[:10],
        "shards": len(watch.published),
        "twice": twice,
        "twice_in_flight": in_flight,
    }


if __name__ == "__main__":
    sys.exit(main())
