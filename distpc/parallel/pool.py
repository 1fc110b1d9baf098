"""Workers of a cluster that share out items, and what happens when one of them dies."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distpc.config.schema import ParallelConfig
from distpc.errors import DistpcError, HeldLostError, ResourceError
from distpc.parallel.progress import Progress
from distpc.parallel.worker import WorkerHost, shown, split

_PATIENCE_SECONDS = 30.0
_SHOWN_CHARACTERS = 300


class ItemQueue:
    """Items that wait, and which worker takes which.

    A worker takes first the items that it had before (it may have cached what they need), then
    new ones, then the last of the worker with most left.
    """

    def __init__(self, num_items: int, homes: dict[int, int]) -> None:
        self._new: deque[int] = deque()
        self._own: dict[int, deque[int]] = {}
        for index in range(num_items):
            if index in homes:
                self._own.setdefault(homes[index], deque()).append(index)
            else:
                self._new.append(index)

    def next_for(self, worker: int) -> int | None:
        """Remove and return the index of the next item for `worker`; None when all are taken."""
        own = self._own.get(worker)
        if own:
            return own.popleft()
        if self._new:
            return self._new.popleft()
        longest = max(self._own.values(), key=len, default=None)
        return longest.pop() if longest else None


@dataclass
class _Task:
    worker: int
    index: int
    held: Any = None


class Pool:
    """Worker processes that live until `close`, started when the first items come.

    Args:
        ray: the ray module, connected.
        host: the class that runs in the worker processes.
        worker: `module:Class`.
        kwargs: of its constructor; may hold handles.
        parallel: how many workers, of what size.
    """

    def __init__(
        self,
        ray: Any,
        host: type[WorkerHost],
        worker: str,
        kwargs: dict[str, Any],
        parallel: ParallelConfig,
    ) -> None:
        self._ray = ray
        self._worker = worker
        self._kwargs = kwargs
        self._parallel = parallel
        self._actor_class = ray.remote(host).options(
            num_cpus=parallel.cpus_per_worker,
            num_gpus=parallel.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
        )
        self._actors: list[Any] = []
        self._ready: dict[int, Any] = {}
        self._homes: dict[int, int] = {}
        self._told = False
        self._cause = ""

    def map(
        self,
        items: Sequence[Any],
        *,
        method: str = "__call__",
        label: str = "",
        retries: int | None = None,
        hold: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of every item as it is finished.

        A worker that dies (killed, out of memory) is replaced and its item tried again, so
        results must not depend on which worker made them or how often. In later calls item i goes
        preferably to the worker that had item i before.

        Args:
            items: arguments, one a call; handles of `Cluster.put` inside their dicts, lists and
                tuples arrive as their values.
            method: of the worker object.
            label: of the progress bar; none is shown without.
            retries: times that one item is tried again after its worker died
                (default: parallel.max_worker_restarts).
            hold: the method returns a pair; the second of it stays in the cluster's object store,
                and a handle comes in its place, to go inside later items.

        Raises:
            DistpcError: the worker's code raised it, or raised something else, which it names;
                not tried again.
            HeldLostError: an item's handle leads to what a lost machine held.
            ResourceError: one item's workers died `retries` + 1 times, or the node that this
                process is attached to.
        """
        if retries is None:
            retries = self._parallel.max_worker_restarts
        queue = ItemQueue(len(items), self._homes)
        deaths: Counter[int] = Counter()
        running: dict[Any, _Task] = {}
        self._grow(min(self._parallel.num_workers, len(items)))
        for worker in range(len(self._actors)):
            self._give(worker, queue.next_for(worker), items, method, running, hold)
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(label, len(items))) if label else None
            while running:
                task, outcome = self._next(running)
                if outcome is None:
                    self._refuse_if_cut_off()
                    deaths[task.index] += 1
                    if deaths[task.index] > retries:
                        raise _lost(items[task.index], task, deaths[task.index], self._cause)
                    _tell(f"worker {task.worker} died over item {task.index}: replaced")
                    self._actors[task.worker] = self._new_actor(task.worker)
                    self._give(task.worker, task.index, items, method, running, hold)
                    continue
                if outcome.error is not None:
                    raise outcome.error
                self._homes[task.index] = task.worker
                self._give(task.worker, queue.next_for(task.worker), items, method, running, hold)
                if progress is not None:
                    progress.advance()
                yield task.index, (outcome.value, task.held) if hold else outcome.value

    def close(self) -> None:
        """End the workers. Idempotent."""
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._actors.clear()
        self._ready.clear()
        self._homes.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _grow(self, num_workers: int) -> None:
        while len(self._actors) < num_workers:
            self._actors.append(self._new_actor(len(self._actors)))

    def _new_actor(self, worker: int) -> Any:
        handles: list[Any] = []
        kwargs = split(self._kwargs, self._ray.ObjectRef, handles)
        threads = max(1, int(self._parallel.cpus_per_worker))
        gpus = self._parallel.gpus_per_worker
        actor = self._actor_class.remote(self._worker, kwargs, threads, gpus, *handles)
        self._ready[worker] = actor.ready.remote()
        return actor

    def _give(
        self,
        worker: int,
        index: int | None,
        items: Sequence[Any],
        method: str,
        running: dict[Any, _Task],
        hold: bool,
    ) -> None:
        if index is None:
            return
        handles: list[Any] = []
        item = split(items[index], self._ray.ObjectRef, handles)
        actor = self._actors[worker]
        if hold:
            outcome, held = actor.run_and_hold.options(num_returns=2).remote(method, item, *handles)
        else:
            outcome, held = actor.run.remote(method, item, *handles), None
        running[outcome] = _Task(worker, index, held)

    def _next(self, running: dict[Any, _Task]) -> tuple[_Task, Any]:
        """The next task to end and its outcome; None as outcome when its worker died."""
        errors = self._ray.exceptions
        done: list[Any] = []
        while not done:
            done, _ = self._ray.wait(list(running), num_returns=1, timeout=_PATIENCE_SECONDS)
            if not done:
                self._refuse_if_cut_off()
                self._tell_who_waits()
        task = running.pop(done[0])
        try:
            return task, self._ray.get(done[0])
        except errors.RayTaskError as error:
            if isinstance(error.cause, _lost_objects(errors)):
                raise _held_lost(task, error.cause) from error
            raise DistpcError(
                "a worker's result or item cannot travel between processes",
                where=f"worker {self._worker}",
                found=error,
                expected="values that pickle",
            ) from error
        except _lost_objects(errors) as error:
            raise _held_lost(task, error) from error
        except errors.RayError as error:
            self._cause = " ".join(str(error).split())
            # It may be cut off rather than dead.
            self._ray.kill(self._actors[task.worker], no_restart=True)
            return task, None

    def _refuse_if_cut_off(self) -> None:
        """Fail where the cluster's process on this machine is gone: it would start no worker for
        this driver any more, and waiting would have no end."""
        own = self._ray.get_runtime_context().get_node_id()
        if any(node["Alive"] and node["NodeID"] == own for node in self._ray.nodes()):
            return
        raise ResourceError(
            "the cluster lost the node that this process is attached to",
            where=f"node {own}",
            found="its Ray process (raylet) is dead",
            expected="a node that lives as long as its drivers",
            fix="start it again, then run the same command again: finished items are kept",
        )

    def _tell_who_waits(self) -> None:
        """Say once that a shared cluster has not given all workers their place."""
        ready, waiting = self._ray.wait(
            list(self._ready.values()), num_returns=len(self._ready), timeout=0
        )
        if waiting and not self._told:
            self._told = True
            free = self._ray.available_resources().get("CPU", 0)
            _tell(
                f"{len(waiting)} of {len(ready) + len(waiting)} workers wait for a place in the "
                f"cluster; free now: {free:g} CPUs"
            )


def _lost_objects(errors: Any) -> tuple[type[Exception], ...]:
    """What Ray raises where the value of a handle is gone, not the worker."""
    return errors.ObjectLostError, errors.ObjectFetchTimedOutError


def _held_lost(task: _Task, cause: Any) -> HeldLostError:
    return HeldLostError(
        "a machine was lost with results that it held for later work",
        where=f"item {task.index}",
        found=" ".join(str(cause).split())[:_SHOWN_CHARACTERS],
        fix="run the same command again: finished work is kept",
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lost(item: Any, task: _Task, deaths: int, cause: str) -> ResourceError:
    return ResourceError(
        f"{deaths} workers in a row died over the same item",
        where=f"item {task.index}: {shown(item)}",
        found=cause,
        expected="a worker that lives to finish it",
        fix="most often memory: lower parallel.num_workers or the size of a shard, then run the "
        "same command again: finished items are kept",
    )
