"""Workers of a cluster that share out items: they join and leave with the cluster, and may die."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distpc.config.schema import ParallelConfig
from distpc.errors import DistpcError
from distpc.parallel import losses
from distpc.parallel.items import ItemQueue
from distpc.parallel.progress import Progress
from distpc.parallel.room import count_places
from distpc.parallel.tally import Tally
from distpc.parallel.worker import WorkerHost, split

_PATIENCE_SECONDS = 30.0
_LOOK_SECONDS = 2.0
"""Time between two looks at what the cluster has."""


@dataclass(frozen=True)
class Lost:
    """In place of a result: every worker that was given the item died.

    Attributes:
        deaths: how many.
        cause: what the cluster says of the last.
    """

    deaths: int
    cause: str


@dataclass
class _Worker:
    """A worker process: `starting` is the answer that it owes until it runs."""

    actor: Any
    starting: Any
    held: list[int] = field(default_factory=list)


@dataclass
class _Task:
    worker: int
    index: int
    held: Any = None


@dataclass
class _Job:
    """One call of `map`."""

    items: Sequence[Any]
    method: str
    needs: Sequence[Hashable | None]
    queue: ItemQueue
    retries: int
    ahead: int
    hold: bool
    release: bool
    deaths: Counter[int] = field(default_factory=Counter)
    running: dict[Any, _Task] = field(default_factory=dict)

    @property
    def unfinished(self) -> int:
        """Items without a result."""
        return len(self.queue) + len(self.running)


class Pool:
    """Worker processes that live until `close`, started when the first items come.

    There are `parallel.num_workers`, and up to `parallel.max_workers` while the cluster has free
    places: new ones join between two items when machines have joined the cluster, and those of
    machines that left are not replaced before there is room again.

    Args:
        ray: the ray module, connected.
        host: the class that runs in the worker processes.
        worker: `module:Class`.
        kwargs: of its constructor; may hold handles.
        parallel: how many workers, of what size.
        ahead: items that a worker may hold beside the one that it works on.
        ask: tells the cluster's autoscaler the places that are wanted in all.
        tally: of the time that workers spend.
    """

    def __init__(
        self,
        ray: Any,
        host: type[WorkerHost],
        worker: str,
        kwargs: dict[str, Any],
        parallel: ParallelConfig,
        ahead: int,
        ask: Callable[[list[dict[str, float]]], None],
        tally: Tally | None = None,
    ) -> None:
        self._ray = ray
        self._worker = worker
        self._kwargs = kwargs
        self._parallel = parallel
        self._ahead = ahead
        self._ask = ask
        self._tally = tally or Tally("")
        self._asked_places = 0
        self._actor_class = ray.remote(host).options(
            num_cpus=parallel.cpus_per_worker,
            num_gpus=parallel.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=1 + ahead,
        )
        self._workers: dict[int, _Worker] = {}
        self._homes: dict[Hashable, int] = {}
        self._told = False
        self._cause = ""
        self._stillborn = 0
        self._looked = 0.0
        self._homeless: float | None = None
        self.most_workers = 0
        """Workers that ran side by side, at most."""
        self.ready_seconds: float | None = None
        """Time from the first request to the first worker that runs."""
        self._asked = 0.0

    def map(
        self,
        items: Sequence[Any],
        *,
        method: str = "__call__",
        label: str = "",
        retries: int | None = None,
        hold: bool = False,
        ahead: int | None = None,
        release: bool = False,
        lost: Literal["raise", "yield"] = "raise",
        needs: Sequence[Hashable | None] = (),
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of every item as it is finished.

        A worker that dies (killed, out of memory) is replaced and its item tried again, so
        results must not depend on which worker made them or how often.

        Args:
            items: arguments, one a call; handles of `Cluster.put` inside their dicts, lists and
                tuples arrive as their values.
            method: of the worker object.
            label: of the progress bar; none is shown without.
            retries: times that one item is tried again after its worker died
                (default: parallel.max_worker_restarts).
            hold: the method returns a pair; the second of it stays in the cluster's object store,
                and a handle comes in its place, to go inside later items.
            ahead: items that a worker holds beside its own, at most the pool's (the default).
            release: let workers go as soon as nothing is left for them to take.
            lost: what to do about an item whose workers all died: raise an error, or yield `Lost`
                in place of its result.
            needs: of each item, what a worker may have kept from an earlier call (the name of a
                file; None for nothing): it goes preferably to the worker that had it first.

        Raises:
            DistpcError: the worker's code raised it, or raised something else, which it names;
                not tried again.
            ResourceError: one item's workers died `retries` + 1 times, workers die before they
                are given any, or the cluster has had no room for one for parallel.join_seconds.
        """
        job = _Job(
            items,
            method,
            needs,
            ItemQueue(len(items), self._homes_of(needs)),
            self._parallel.max_worker_restarts if retries is None else retries,
            self._ahead if ahead is None else min(ahead, self._ahead),
            hold,
            release,
        )
        self._looked = 0.0
        self._asked = self._asked or time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget, job)
            progress = stack.enter_context(Progress(label, len(items))) if label else None
            for task, outcome in self._results(job):
                if outcome is None:
                    if not self._try_again(job, task, lost):
                        yield task.index, Lost(job.deaths[task.index], self._cause)
                    continue
                if progress is not None:
                    progress.advance()
                yield task.index, (outcome.value, task.held) if hold else outcome.value

    def _homes_of(self, needs: Sequence[Hashable | None]) -> dict[int, int]:
        """The workers that have what items need, by item."""
        # Of those that are no more the memory is lost.
        self._homes = {need: n for need, n in self._homes.items() if n in self._workers}
        return {i: self._homes[need] for i, need in enumerate(needs) if need in self._homes}

    @property
    def num_workers(self) -> int:
        """Workers that run or are being started."""
        return len(self._workers)

    def close(self) -> None:
        """End the workers. Idempotent."""
        self._ask_for(0)
        for number in list(self._workers):
            self._dismiss(number)
        self._homes.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _results(self, job: _Job) -> Iterator[tuple[_Task, Any]]:
        """Tasks with their outcomes, until no item is left; None as outcome when a worker died.

        Raises:
            DistpcError: a worker's.
        """
        while job.unfinished:
            self._fit_to_cluster(job)
            self._hand_out(job)
            for task, outcome in self._ended(job):
                if outcome is not None:
                    if outcome.error is not None:
                        raise outcome.error
                    if job.needs and job.needs[task.index] is not None:
                        self._homes.setdefault(job.needs[task.index], task.worker)
                    # Before the caller computes with the result: no worker should wait for that.
                    self._hand_out(job)
                    if outcome.work is not None:
                        self._tally.add(outcome.work)
                yield task, outcome

    def _fit_to_cluster(self, job: _Job) -> None:
        """Start workers where some are missing, and more where the cluster has free places."""
        useful = self._useful(job)
        least = min(self._parallel.num_workers, useful)
        most = min(self._parallel.max_workers or least, useful)
        self._ask_for(most if most > self._parallel.num_workers else 0)
        runs = any(worker.starting is None for worker in self._workers.values())
        if runs and len(self._workers) >= max(least, most):
            return
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        first, self._looked = self._looked == 0.0, now
        # A cluster was found large enough before the pool was made.
        room = least if first else self._room()
        while len(self._workers) < min(least, room):
            self._start_worker()
        if most > least and not any(worker.starting for worker in self._workers.values()):
            free = count_places(self._parallel, [self._ray.available_resources()])
            for _ in range(min(most - len(self._workers), self._room() - len(self._workers), free)):
                self._start_worker()
        self._refuse_to_wait_for_ever(runs or room > 0, now)

    def _refuse_to_wait_for_ever(self, is_hopeful: bool, now: float) -> None:
        if is_hopeful:
            self._homeless = None
            return
        if self._homeless is None:
            self._homeless = now
            _tell("no machine of the cluster has room for a worker: waiting for one to join")
        if now - self._homeless > self._parallel.join_seconds:
            raise losses.no_room(self._parallel, self._machines())

    def _ask_for(self, num_workers: int) -> None:
        """Let an autoscaler know for how many workers there should be room; 0 takes it back."""
        if num_workers != self._asked_places:
            place = {"CPU": self._parallel.cpus_per_worker, "GPU": self._parallel.gpus_per_worker}
            self._ask([{k: v for k, v in place.items() if v}] * num_workers)
            self._asked_places = num_workers

    def _room(self) -> int:
        """Workers that fit on the cluster as it is now, were it empty."""
        return count_places(self._parallel, self._machines())

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _start_worker(self) -> None:
        number = next(n for n in range(len(self._workers) + 1) if n not in self._workers)
        handles: list[Any] = []
        kwargs = split(self._kwargs, self._ray.ObjectRef, handles)
        threads = max(1, int(self._parallel.cpus_per_worker))
        gpus = self._parallel.gpus_per_worker
        actor = self._actor_class.remote(self._worker, kwargs, threads, gpus, *handles)
        self._workers[number] = _Worker(actor, actor.ready.remote())

    def _dismiss(self, number: int) -> None:
        self._ray.kill(self._workers.pop(number).actor, no_restart=True)

    def _hand_out(self, job: _Job) -> None:
        """Give every worker that runs as many items as it may hold; one each first."""
        for depth in range(1 + job.ahead):
            for number, worker in self._workers.items():
                if worker.starting is None and len(worker.held) == depth:
                    self._give(job, number, worker)
        if job.release and not len(job.queue):
            for number, worker in list(self._workers.items()):
                if not worker.held:
                    self._dismiss(number)

    def _give(self, job: _Job, number: int, worker: _Worker) -> None:
        index = job.queue.next_for(number, worker.held)
        if index is None:
            return
        handles: list[Any] = []
        item = split(job.items[index], self._ray.ObjectRef, handles)
        actor = worker.actor
        if job.hold:
            method = actor.run_and_hold.options(num_returns=2)
            outcome, held = method.remote(job.method, item, *handles)
        else:
            outcome, held = actor.run.remote(job.method, item, *handles), None
        worker.held.append(index)
        job.running[outcome] = _Task(number, index, held)

    def _ended(self, job: _Job) -> Iterator[tuple[_Task, Any]]:
        """Tasks that ended, with their outcomes; None as outcome when their worker died.

        Workers that began to run meanwhile are noted; there may be no task at all.
        """
        starting = {w.starting: n for n, w in self._workers.items() if w.starting is not None}
        seconds = _LOOK_SECONDS if self._may_change(job) else _PATIENCE_SECONDS
        waited_for = [*job.running, *starting]
        if not waited_for:
            time.sleep(_LOOK_SECONDS)
            return
        done, _ = self._ray.wait(waited_for, num_returns=1, timeout=seconds)
        if not done:
            self._refuse_if_cut_off()
            self._tell_who_waits(len(starting))
        for reference in done:
            if reference in starting:
                self._note_start(starting[reference])
                continue
            task = job.running.pop(reference)
            self._workers[task.worker].held.remove(task.index)
            outcome = self._outcome(task, reference)
            if outcome is None:
                yield from self._of_the_dead(job, task)
            else:
                yield task, outcome

    def _may_change(self, job: _Job) -> bool:
        """Whether there may be more workers soon than there are."""
        wanted = max(self._parallel.num_workers, self._parallel.max_workers or 0)
        nobody_runs = all(worker.starting is not None for worker in self._workers.values())
        return nobody_runs or len(self._workers) < min(wanted, self._useful(job))

    def _useful(self, job: _Job) -> int:
        """Workers that would have something to do."""
        return len(job.queue) + sum(bool(worker.held) for worker in self._workers.values())

    def _note_start(self, number: int) -> None:
        worker = self._workers[number]
        try:
            self._ray.get(worker.starting)
        except self._ray.exceptions.RayError as error:
            self._cause = " ".join(str(error).split())
            self._dismiss(number)
            self._stillborn += 1
            self._looked = min(self._looked, time.monotonic() - _LOOK_SECONDS)
            if self._stillborn > self._parallel.max_worker_restarts:
                raise losses.at_start(self._worker, self._stillborn, self._cause) from error
            return
        worker.starting = None
        self._stillborn = 0
        running = sum(worker.starting is None for worker in self._workers.values())
        self.most_workers = max(self.most_workers, running)
        if self.ready_seconds is None:
            self.ready_seconds = time.monotonic() - self._asked
        self._tally.running(running, self.ready_seconds)

    def _outcome(self, task: _Task, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, (errors.ObjectLostError, errors.ObjectFetchTimedOutError)):
                raise losses.of_held(task.index, error.cause) from error
            raise DistpcError(
                "a worker's result or item cannot travel between processes",
                where=f"worker {self._worker}",
                found=error,
                expected="values that pickle",
            ) from error
        except (errors.ObjectLostError, errors.ObjectFetchTimedOutError) as error:
            raise losses.of_held(task.index, error) from error
        except errors.RayError as error:
            self._cause = " ".join(str(error).split())
            return None

    def _refuse_if_cut_off(self) -> None:
        """Fail where the cluster's process on this machine is gone: it would start no worker for
        this driver any more, and waiting would have no end."""
        own = self._ray.get_runtime_context().get_node_id()
        if not any(node["Alive"] and node["NodeID"] == own for node in self._ray.nodes()):
            raise losses.of_own_node(own)

    def _of_the_dead(self, job: _Job, task: _Task) -> Iterator[tuple[_Task, Any]]:
        """All that the dead worker of `task` held."""
        self._refuse_if_cut_off()
        self._tally.lost += 1
        # It may be cut off rather than dead.
        self._dismiss(task.worker)
        self._looked = min(self._looked, time.monotonic() - _LOOK_SECONDS)
        yield task, None
        for reference, other in list(job.running.items()):
            if other.worker == task.worker:
                del job.running[reference]
                yield other, None

    def _try_again(self, job: _Job, task: _Task, lost: str) -> bool:
        """Let the item of a dead worker wait again; False when it has had its chances.

        Raises:
            ResourceError: it has, and that is to be an error.
        """
        job.deaths[task.index] += 1
        deaths = job.deaths[task.index]
        if deaths <= job.retries:
            _tell(f"worker {task.worker} died over item {task.index}: it is tried again")
            job.queue.put_back(task.index)
            return True
        if lost == "raise":
            raise losses.of_item(task.index, job.items[task.index], deaths, self._cause)
        return False

    def _forget(self, job: _Job) -> None:
        """Take from the workers what a call that ended early gave them: to later calls it would
        look like work that they have, and with enough of it they would be given none."""
        for task in job.running.values():
            worker = self._workers.get(task.worker)
            if worker is not None:
                worker.held.remove(task.index)
        job.running.clear()

    def _tell_who_waits(self, waiting: int) -> None:
        """Say once that workers have not begun: they load, or a shared cluster has no place."""
        if waiting and not self._told and time.monotonic() - self._asked > _PATIENCE_SECONDS:
            self._told = True
            free = self._ray.available_resources().get("CPU", 0)
            _tell(
                f"{waiting} of {len(self._workers)} workers have not begun: they are starting, or "
                f"wait for a place in the cluster (free now: {free:g} CPUs)"
            )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
