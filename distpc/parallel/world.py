"""The ranks that a launcher (torchrun, deepspeed) started: rank 0 leads, the others follow.

All of them run the same command. Rank 0 runs the stages that need one process; what needs all
ranks it calls on all of them, itself included. They speak through a store, not through
collectives, because the others may wait for hours and must hear of a failure meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from distpc.config.schema import ParallelConfig
from distpc.errors import DistpcError, ResourceError, TrainingError
from distpc.parallel import collectives
from distpc.parallel.failures import (
    Failure,
    first_own,
    first_rank,
    from_json,
    rank_failed,
    to_json,
)
from distpc.parallel.greeting import POLL_SECONDS, Refused, greet, open_store
from distpc.parallel.mesh import Launch, Mesh, speaks_for_machine
from distpc.parallel.processes import die_with_parent, leave_for_launcher
from distpc.parallel.rank import call
from distpc.parallel.watch import FAILURES, Watch

# How long a rank that failed waits for others to report what may have failed before.
_REPORT_SECONDS = 1.0
# How long rank 0 waits for the others' goodbye, and they for rank 0 to speak before they exit:
# launchers kill all ranks when the first one exits.
_GOODBYE_SECONDS = 5.0


class World:
    """All ranks, as one of them sees them; made by `joined`."""

    current: ClassVar[World | None] = None

    def __init__(self, launch: Launch, store: dist.TCPStore, name: str, parallel: ParallelConfig):
        self.launch = launch
        self._store = dist.PrefixStore(name, store)
        self._parallel = parallel
        self._orders = 0
        self._watch = Watch(
            open_store(_client(launch), parallel.join_seconds),
            name,
            launch.rank,
            launch.world_size,
            parallel.lost_seconds,
            self._reason,
        )

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.launch.rank == 0

    @classmethod
    @contextlib.contextmanager
    def joined(cls, parallel: ParallelConfig, facts: dict[str, Any]) -> Iterator[World]:
        """Meet the other ranks; inside, `launch.run_ranks` runs on all of them.

        Ranks above 0 call `follow` inside. An error on any rank ends all of them: rank 0 raises
        it, the others exit silently with status 2.

        Args:
            parallel: how long to wait for what.
            facts: nested JSON values that must be the same on all ranks.

        Raises:
            TrainingError: a rank did not join or was lost.
            ConfigError: a rank was started with other facts.
        """
        die_with_parent(os.getppid())
        launch = Launch.from_environment()
        store = open_store(launch, parallel.join_seconds)
        try:
            name = greet(store, launch, facts, parallel.join_seconds)
        except Refused as refused:
            if speaks_for_machine():
                leave_for_launcher(refused.error)
            time.sleep(_GOODBYE_SECONDS)
            raise SystemExit(2) from refused
        world = cls.current = cls(launch, store, name, parallel)
        world._watch.start()
        try:
            yield world
            if world.leads:
                world._order({"do": "end"})
        except Exception as error:
            leave_for_launcher(error)
            if world.leads:
                world._tell(error)
            raise
        finally:
            cls.current = None
            world._watch.stop()
            collectives.finish()

    def call(self, target: str, payload: dict[str, Any], threads: int, log_folder: Path) -> None:
        """Run `target(payload, mesh)` on all ranks; rank 0 calls this.

        Raises:
            DistpcError: the first that a rank raised.
            TrainingError: a rank failed in another way.
        """
        order = {
            "do": "call",
            "target": target,
            "payload": payload,
            "threads": threads,
            "log_folder": str(log_folder),
        }
        number = self._order(order)
        threads_before = torch.get_num_threads()
        try:
            self._run(order)
        except Exception as error:
            self._report(error)
            time.sleep(_REPORT_SECONDS)
            raise self._first(error) from error
        finally:
            torch.set_num_threads(threads_before)
        waiting = list(range(1, self.launch.world_size))
        deadline = time.monotonic() + self._parallel.wait_seconds
        while waiting:
            if self._num_failures() > 0:
                time.sleep(_REPORT_SECONDS)
                raise self._first(None)
            waiting = [rank for rank in waiting if not self._store.check([f"done/{number}/{rank}"])]
            if waiting and time.monotonic() > deadline:
                raise self._too_long(f"rank {waiting[0]} to end {target}")
            time.sleep(POLL_SECONDS if waiting else 0)

    def follow(self) -> None:
        """Do what rank 0 orders, until it ends; ranks above 0 call this."""
        while True:
            self._orders += 1
            order = self._await_order(self._parallel.wait_seconds)
            if order["do"] == "call":
                try:
                    self._run(order)
                except Exception as error:
                    self._fail(error)
                self._store.set(f"done/{self._orders}/{self.launch.rank}", "1")
                continue
            self._watch.stop()
            self._store.set(f"goodbye/{self.launch.rank}", "1")
            if order["do"] == "end":
                return
            # Rank 0 tells the error and ends; launchers then end this process.
            self._leave_reason(None)
            time.sleep(_GOODBYE_SECONDS)
            raise SystemExit(2)

    def _run(self, order: dict[str, Any]) -> None:
        folder = Path(order["log_folder"])
        if not folder.is_dir():
            raise ResourceError(
                f"rank {self.launch.rank} does not see the run folder",
                where=folder,
                found="no such folder on this machine",
                expected="one folder that all machines share",
                fix="give an --out on storage that is mounted alike on all machines",
            )
        torch.set_num_threads(order["threads"])
        mesh = Mesh.from_environment()
        # Kept until the end: DeepSpeed remembers groups, and they must stay those of this group.
        store = dist.PrefixStore("group", self._store)
        collectives.start(mesh, store, seconds=self._parallel.collective_seconds)
        call(order["target"], order["payload"], mesh)

    def _order(self, order: dict[str, Any]) -> int:
        self._orders += 1
        if order["do"] != "call":
            self._watch.stop()
        self._store.set(f"order/{self._orders}", json.dumps(order))
        if order["do"] != "call":
            # This process may hold the store: it goes last.
            keys = [f"goodbye/{rank}" for rank in range(1, self.launch.world_size)]
            deadline = time.monotonic() + _GOODBYE_SECONDS
            while keys and not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        return self._orders

    def _await_order(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        key = f"order/{self._orders}"
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    self._fail(self._too_long("rank 0 to end a stage"))
                time.sleep(POLL_SECONDS)
            order: dict[str, Any] = json.loads(self._store.get(key))
        except (RuntimeError, OSError):
            # The store is gone, and rank 0 with it: the watch ends this process in its words.
            time.sleep(3 * _GOODBYE_SECONDS)
            raise
        return order

    def _fail(self, error: Exception) -> None:
        """Report `error`, leave the group so that no rank waits for this one, and end."""
        self._report(error)
        collectives.finish()
        self._orders += 1
        if self._store.check([f"order/{self._orders}"]):
            self._orders += 1
        deadline = time.monotonic() + 2 * _GOODBYE_SECONDS
        while time.monotonic() < deadline:
            if self._store.check([f"order/{self._orders}"]):
                self._watch.stop()
                self._store.set(f"goodbye/{self.launch.rank}", "1")
                self._leave_reason(error)
                time.sleep(_GOODBYE_SECONDS)
                raise SystemExit(2) from error
            time.sleep(POLL_SECONDS)
        raise error

    def _tell(self, error: Exception) -> None:
        self._report(error)
        with contextlib.suppress(RuntimeError, OSError):
            self._order({"do": "fail"})

    def _report(self, error: BaseException) -> None:
        """Leave `error` for the others, unless this rank left one before."""
        key = f"failure/{self.launch.rank}"
        with contextlib.suppress(RuntimeError, OSError):
            if not self._store.check([key]):
                self._store.set(key, json.dumps(to_json(error)))
                self._store.add(FAILURES, 1)

    def _leave_reason(self, own: Exception | None) -> None:
        """Where another machine's launcher shows it: rank 0 leaves it on its own."""
        if speaks_for_machine():
            leave_for_launcher(self._first(own))

    def _num_failures(self) -> int:
        return int(self._store.add(FAILURES, 0))

    def _first(self, own: Exception | None) -> Exception:
        """The error that began it, of all that the ranks reported."""
        error = self._reason(self._store)
        return error or own or TrainingError("a rank failed and left no error")

    def _reason(self, store: dist.Store) -> DistpcError | None:
        failures: dict[int, Failure] = {}
        for rank in range(self.launch.world_size):
            if store.check([f"failure/{rank}"]):
                failures[rank] = from_json(json.loads(store.get(f"failure/{rank}")))
        own, rank_of_first = first_own(failures), first_rank(failures)
        if own is not None or rank_of_first is None:
            return own
        first = failures[rank_of_first]
        how = f"failed: {first.summary}"
        return rank_failed(rank_of_first, self.launch.world_size, how, first.trace, None)

    def _too_long(self, what: str) -> TrainingError:
        return TrainingError(
            f"rank {self.launch.rank} of {self.launch.world_size} waited too long for {what}",
            found=f"{self._parallel.wait_seconds:g} s (parallel.wait_seconds)",
            fix="run the same command again: finished work is kept; raise parallel.wait_seconds "
            "if the stage needs longer",
        )


def _client(launch: Launch) -> Launch:
    """The same place, where the store is open already."""
    return Launch(
        launch.launcher, launch.rank, launch.world_size, launch.host, launch.port, has_store=True
    )
