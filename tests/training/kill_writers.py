"""Processes that write checkpoints together and are killed, over and over.

python kill_writers.py FOLDER TRIALS SEED        prints one JSON line a trial
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from distpc.parallel.mesh import Mesh
from distpc.training.checkpoint import Checkpoints, Piece, TrainingFacts
from distpc.training.checkpoint.draft import Draft

WRITERS = 3
SHAPE = (3, 100_001)


def pieces(step: int, number: int) -> list[Piece]:
    """A writer's share of two tensors that hold the step in every element."""
    total = SHAPE[0] * SHAPE[1]
    first, last = (total * n // WRITERS for n in (number, number + 1))
    values = torch.full((last - first,), float(step))
    return [Piece(name, SHAPE, first, values) for name in ("sums.0", "sums.1")]


def write_forever(checkpoints: Checkpoints, step: int, number: int, trial: int, told: int) -> None:
    """What one writer does until it is killed; the first tells of each checkpoint it made."""
    while True:
        step += 1
        draft = Draft(checkpoints, TrainingFacts(step=step), f"{trial}.{step}", WRITERS)
        draft.write(number, pieces(step, number))
        if number == 0:
            draft.publish(threading.Event())
            os.write(told, f"{step}\n".encode())
        while not any(path.name >= f"step-{step:08d}" for path in checkpoints.paths()):
            time.sleep(0.001)


def kill_at_random(checkpoints: Checkpoints, trial: int, step: int, chance: random.Random) -> int:
    """One trial: the step of the last checkpoint that was told of before all were killed."""
    read, told = os.pipe()
    writers = []
    for number in range(WRITERS):
        process = os.fork()
        if process == 0:
            write_forever(checkpoints, step, number, trial, told)
        writers.append(process)
    os.close(told)
    time.sleep(chance.uniform(0.02, 0.4))
    # One dies some moments before the others, as when a host is lost.
    chance.shuffle(writers)
    for process in writers:
        os.kill(process, signal.SIGKILL)
        time.sleep(chance.choice([0.0, 0.01]))
    for process in writers:
        os.waitpid(process, 0)
    with os.fdopen(read) as pipe:
        return max([step, *map(int, pipe.read().split())])


def main(folder: Path, trials: int, seed: int) -> None:
    """Kill, and look at what can be loaded."""
    chance = random.Random(seed)
    checkpoints = Checkpoints(folder, {})
    step = 0
    for trial in range(trials):
        told = kill_at_random(checkpoints, trial, step, chance)
        drafts = len(list(folder.glob(".step-*")))
        found = checkpoints.resume(Mesh(0, 1, 0, torch.device("cpu")))
        values: set[float] = set()
        if found is not None:
            step = found.facts.step
            for tensor in found.statistics().values():
                values |= set(tensor.unique().tolist())
        facts = {"told": told, "found": step, "values": sorted(values), "drafts": drafts}
        damaged = len(list(folder.glob("damaged-*")))
        print(json.dumps({**facts, "damaged": damaged}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
