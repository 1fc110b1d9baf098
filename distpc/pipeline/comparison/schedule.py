"""Runs of a comparison side by side: each a process, all on one Ray cluster, shared stages once.

A stage with the same fingerprint in several runs is made by one of them and lent to the others
by a link into `stages/NAME-FINGERPRINT`, so that a comparison of twenty runs writes its shards
once. Everything is kept between calls: the same command goes on where the last one ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from distpc.artifacts import write_bytes
from distpc.config import dump_config
from distpc.errors import DistpcError, ResourceError, TrainingError
from distpc.parallel.cluster import Cluster
from distpc.parallel.launch import alone
from distpc.parallel.processes import python_path
from distpc.parallel.progress import Progress
from distpc.pipeline.comparison.variants import Run
from distpc.pipeline.runner import Pipeline

CONFIG = "config.yaml"
LOG = "log.txt"
_TAIL_LINES = 12


@dataclass(frozen=True)
class Job:
    """A process that brings one run up to a stage, or to its end."""

    run: Run
    until: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.run.name if self.until is None else f"{self.until} for {self.run.name}"


class Scheduler:
    """Starts jobs, as many at a time as the cluster has room for.

    Args:
        folder: of the comparison.
        num_parallel: jobs at a time; None for as many as fit.
    """

    def __init__(self, folder: Path, num_parallel: int | None) -> None:
        self._stages = folder / "stages"
        self._num_parallel = num_parallel

    def share(self, runs: Sequence[Run], stage: str) -> None:
        """Make a stage once for all runs that need the same one.

        Raises:
            TrainingError: see `_finish`.
        """
        makers: dict[str, Run] = {}
        for run in runs:
            for step in Pipeline(run.config, run.folder).steps():
                if step.stage.name == stage:
                    shared = self._stages / f"{stage}-{step.fingerprint[:16]}"
                    if self._link(step.folder, shared) and step.state != "done":
                        makers.setdefault(step.fingerprint, run)
        self._finish([Job(run, stage) for run in makers.values()], stage)

    def finish(self, runs: Sequence[Run]) -> None:
        """Bring every run to its end.

        Raises:
            TrainingError: some failed; the others are finished.
        """
        missing = [run for run in runs if not is_finished(run)]
        # The largest first: none of them is left alone at the end.
        missing.sort(key=lambda run: -(run.size or 0))
        self._finish([Job(run) for run in missing], "runs")

    def _link(self, place: Path, shared: Path) -> bool:
        """Let a run's stage folder be a link to the shared one; False if it is its own folder."""
        if place.is_symlink():
            if place.resolve() == shared.resolve():
                return True
            place.unlink()
        if place.exists():
            return False
        shared.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(shared, place.parent))
        return True

    def _finish(self, jobs: list[Job], label: str) -> None:
        if not jobs:
            return
        failed: list[tuple[Job, str]] = []
        parallel = jobs[0].run.config.parallel
        with Cluster.connect(parallel) as cluster, Progress(label, len(jobs), "runs") as progress:
            count = self._num_parallel or cluster.num_runs(parallel)
            environment = {
                # Stages that are no training run in the job itself: with a thread a core in each
                # of several jobs, threads would spin for cores that others have.
                "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)),
                **os.environ,
                **cluster.environment(),
                "PYTHONPATH": python_path(),
            }
            with ThreadPoolExecutor(max_workers=count) as pool:
                waiting = {pool.submit(_run, job, environment, cluster.is_own): job for job in jobs}
                try:
                    for done in _as_done(waiting):
                        job = waiting[done]
                        outcome = done.result()
                        if outcome is not None:
                            failed.append((job, outcome))
                        said = "done" if outcome is None else "FAILED"
                        progress.say(f"compare: {job.name}: {said}")
                        progress.advance(1)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        if failed:
            raise _error(failed, len(jobs))


def is_finished(run: Run) -> bool:
    """Whether all its stages are done, and its report is there."""
    if not (run.folder / "report.json").is_file():
        return False
    return all(step.state == "done" for step in Pipeline(run.config, run.folder).steps())


def _as_done(waiting: Iterable[Future[str | None]]) -> Iterable[Future[str | None]]:
    left = set(waiting)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        yield from done


def _run(job: Job, environment: dict[str, str], is_here: bool) -> str | None:
    """Run a job; None, or the end of what it said if it failed.

    Args:
        job: what to run.
        environment: of its process.
        is_here: whether the cluster is this machine alone: then a run of one rank trains in the
            job's own process, which saves the start of another.
    """
    if is_here and job.run.config.parallel.total_ranks == 1:
        environment = {**environment, **alone()}
    folder = job.run.folder
    config = folder / CONFIG
    write_bytes(config, dump_config(job.run.config).encode())
    command = [sys.executable, "-m", "distpc.pipeline.comparison.job", str(config), str(folder)]
    command += [job.until] if job.until else []
    with (folder / LOG).open("ab") as log:
        start = log.tell()
        code = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
    if code == 0:
        return None
    with (folder / LOG).open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return "\n".join([f"exit status {code}", *lines[-_TAIL_LINES:]])


def _error(failed: list[tuple[Job, str]], num_jobs: int) -> DistpcError:
    job, said = failed[0]
    kind = ResourceError if "ResourceError" in said else TrainingError
    return kind(
        f"{len(failed)} of {num_jobs} runs of the comparison failed",
        where=f"{job.run.folder / LOG} ({job.name})",
        found=said,
        fix="mend the cause and run the same command again: finished runs are kept",
    )
