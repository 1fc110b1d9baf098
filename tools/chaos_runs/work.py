"""The run that is disturbed: small, but with many shards; and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

STAGES = ("features", "fit", "assign")
SHARDED = ("features", "assign")
DRIVER = Path(__file__).with_name("driver.py")
NUM_WORKERS = 2

# K x D sums are above the size up to which Ray sends objects by value, so that they can be lost.
CONFIG = f"""
name: chaos
data:
  source: {{kind: digits}}
  samples_per_shard: 12
  patch_size_pixels: 4
teacher: {{kind: random, random_width: 32}}
latents: {{num_clusters: 512, num_rounds: 25, tolerance: 0.0, min_usage_entropy_fraction: 0.0,
  max_dead_fraction: 1.0}}
parallel: {{num_workers: {NUM_WORKERS}}}
"""


def prepare(folder: Path) -> Path:
    """A run folder with everything before the features stage, made once."""
    base = folder / "base"
    config = folder / "chaos.yaml"
    if not (base / "teacher" / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(CONFIG)
        for stage in ("shards", "index", "teacher"):
            command = [sys.executable, "-m", "distpc", stage, str(config), "--out", str(base)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return base


class Driver:
    """The command, started in a run folder; its last words are kept."""

    def __init__(self, folder: Path, run: Path, address: str) -> None:
        self._words = run.with_suffix(".stderr")
        with self._words.open("wb") as words:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVER), str(folder / "chaos.yaml"), str(run)],
                env={**os.environ, "RAY_ADDRESS": address},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
            )

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        return self._words.read_text(errors="replace")[-1500:]

    def end(self) -> None:
        """Kill it if it runs."""
        self.process.kill()
        self.process.wait()


@dataclass
class Watch:
    """What appears in a run folder, and when; looked at many times a second.

    Attributes:
        started, finished: seconds (monotonic) at which a stage's folder and manifest were seen.
        published: stage/shard -> {identity of a published file: when it was seen}.
        rounds: identities of the k-means state that was kept after each round.
    """

    run: Path
    started: dict[str, float] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)
    published: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)
    rounds: set[tuple[int, int]] = field(default_factory=set)

    def look(self) -> None:
        """Note what is new. Every published file is a new one: it was renamed into its place."""
        now = time.monotonic()
        for stage in STAGES:
            folder = self.run / stage
            if folder.is_dir():
                self.started.setdefault(stage, now)
            if (folder / "manifest.json").exists():
                self.finished.setdefault(stage, now)
        for stage in SHARDED:
            for path in (self.run / stage).glob("*.safetensors"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                seen = self.published.setdefault(f"{stage}/{path.stem}", {})
                seen.setdefault((status.st_ino, status.st_mtime_ns), now)

        for path in (self.run / "fit").glob("checkpoint*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            self.rounds.add((status.st_ino, status.st_mtime_ns))

    def steps(self, stage: str) -> int:
        """How far a stage is: shards or rounds."""
        if stage not in SHARDED:
            return len(self.rounds)
        return sum(name.startswith(f"{stage}/") for name in self.published)

    def seconds(self) -> dict[str, float]:
        """How long each stage took."""
        return {stage: self.finished[stage] - self.started[stage] for stage in STAGES}


def fresh(base: Path, run: Path) -> None:
    """A copy of the base, as a run folder of its own."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)


def digests(run: Path) -> dict[str, str]:
    """What must be identical: every tensor file's bytes, and reports without their times."""
    found = {}
    for stage in STAGES:
        for path in sorted((run / stage).glob("*.safetensors")):
            found[f"{stage}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("fit/fit.json", "assign/report.json"):
        value = json.loads((run / name).read_text())
        value.pop("seconds", None)
        text = json.dumps(value, sort_keys=True)
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found
