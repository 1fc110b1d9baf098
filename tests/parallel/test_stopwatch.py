"""What a worker notes of its calls, and what the driver makes of all workers' notes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distpc.parallel.gauges import Gauges
from distpc.parallel.stopwatch import PARTS, Stopwatch, Work, count, holding, part
from distpc.parallel.tally import Tally
from distpc.parallel.worker import Outcome, WorkerHost

CPU = torch.device("cpu")


@part("read")
def read(seconds: float) -> None:
    time.sleep(seconds)


class Reader:
    """A worker that reads, computes and writes for known times."""

    def __call__(self, item: float) -> float:
        read(item)
        time.sleep(2 * item)
        with part("write"):
            # Reading for the sake of writing is writing.
            read(item)
        count(samples=5, shards=1)
        count(samples=1)
        return item

    def pair(self, item: float) -> tuple[float, str]:
        return self(item), "held"


def worked(outcome: Outcome) -> Work:
    assert outcome.error is None and outcome.work is not None
    return outcome.work


def test_seconds_of_a_worker_add_up_to_its_age() -> None:
    host = WorkerHost("test_stopwatch:Reader", {}, 1, 0.0)
    made = time.monotonic()
    time.sleep(0.03)
    first = worked(host.run("__call__", 0.02))
    time.sleep(0.04)
    second = worked(host.run_and_hold("pair", 0.02)[0])
    age = time.monotonic() - made
    assert second.age_seconds == pytest.approx(age, abs=0.02)
    total = sum(sum(work.seconds.values()) for work in (first, second))
    assert total == pytest.approx(second.age_seconds, abs=1e-3)
    for work, idle in ((first, 0.03), (second, 0.04)):
        least = {"read": 0.02, "wait": 0.0, "compute": 0.04, "write": 0.02, "idle": idle}
        assert tuple(work.seconds) == PARTS
        for name, seconds in least.items():
            assert seconds <= work.seconds[name] + 1e-4 and work.seconds[name] < seconds + 0.3
        assert work.counts == {"samples": 6, "shards": 1}
        assert work.peak_memory_bytes > 2**20
    assert second.worker == first.worker
    # A call that fails leaves nothing behind that a later one would be charged for.
    assert host.run("no_such_method", None).error is not None
    assert sum(worked(host.run("__call__", 0.0)).seconds.values()) < 0.3


class Multiplier:
    """A worker whose operations are known: in inference mode, where torch cuts others up later."""

    def multiply(self, size: int) -> int:
        a = torch.ones(size, size)
        with torch.inference_mode():
            for _ in range(4):
                torch.nn.functional.linear(a, a)
        (a.requires_grad_() @ a).sum().backward()
        return 2 * size**3 * (4 + 3)


def test_operations_of_some_calls_are_counted() -> None:
    host = WorkerHost("test_stopwatch:Multiplier", {}, 1, 0.0)
    for number in range(1, 5):
        outcome = host.run("multiply", 256)
        work = worked(outcome)
        assert (work.tflops is not None) == (number in (1, 2, 4))
        if work.tflops is not None and work.device_peak_fraction is not None:
            found = work.tflops * 1e12 * work.seconds["compute"]
            assert found == pytest.approx(outcome.value, rel=1e-6)
            assert work.device_peak_fraction > 0.0
    tally = Tally("fit")
    assert "tflops" not in tally.to_json()
    for worker in ("a", "b", "b"):
        tally.add(Work(worker, tflops=0.5, device_peak_fraction=0.25))
    figures = tally.to_json()
    assert (figures["tflops"], figures["device_peak_fraction"]) == (1.0, 0.25)


def test_outside_of_a_worker_nothing_is_noted() -> None:
    read(0.0)
    count(samples=3)
    with holding(threading.Lock()):
        pass


def test_calls_that_overlap_are_told_apart() -> None:
    """Two threads: the second waits for the lock of the first, and nobody is idle meanwhile."""
    watch, lock, in_lock = Stopwatch(CPU), threading.Lock(), threading.Event()

    def first() -> Work:
        with watch.call() as work, holding(lock):
            in_lock.set()
            time.sleep(0.1)
        return work

    def second() -> Work:
        in_lock.wait()
        with watch.call() as work, holding(lock):
            count(samples=1)
        return work

    with ThreadPoolExecutor(2) as pool:
        one, two = (made.result() for made in [pool.submit(first), pool.submit(second)])
    assert one.seconds["wait"] < 0.05 <= two.seconds["wait"]
    assert one.seconds["compute"] >= 0.1 and two.seconds["compute"] < 0.05
    assert two.seconds["idle"] == 0.0
    assert (one.counts, two.counts) == ({}, {"samples": 1})


class Gauge:
    """Stands for Ray's; the real one is tried in `test_cluster`."""

    shown: dict[tuple[str, str | None], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys and tags["stage"] == "fit"
        Gauge.shown[self.name, tags.get("worker")] = value


def a_call(worker: str, read: float, samples: int) -> Work:
    work = Work(worker, counts={"samples": samples}, age_seconds=2.0, peak_memory_bytes=7)
    work.seconds |= {"read": read, "compute": 1.0}
    return work


def test_a_tally_shows_each_worker_and_all(tmp_path: Path) -> None:
    Gauge.shown = {}
    (tmp_path / "events.out.tfevents.1.of.an.earlier.attempt").touch()
    with Tally("fit", tmp_path) as tally:
        tally.show_in(Gauges(Gauge, "fit"))
        tally.running(1, 0.5)
        tally.add(a_call("a:1", 0.25, 10))
        tally.running(2, 9.9)
        tally.lost += 1
        tally.add(a_call("b:2", 0.5, 30))
        time.sleep(0.01)
        tally.add(a_call("b:2", 0.5, 30))
    facts = tally.to_json()
    wall = facts.pop("wall_seconds")
    assert facts.pop("samples_per_second") == pytest.approx(70 / wall, rel=0.1)
    assert facts == {
        "seconds": {"read": 1.25, "wait": 0.0, "compute": 3.0, "write": 0.0, "idle": 0.0},
        "start_seconds": 0.5,
        "most_workers": 2,
        "lost_workers": 1,
        "peak_memory_bytes": 7,
    }
    found = scalars(tmp_path)
    for name, one, other in (
        ("read_seconds", 0.25, 1.0),
        ("compute_seconds", 1.0, 2.0),
        ("samples_per_second", 5.0, 30.0),
        ("peak_memory_bytes", 7.0, 7.0),
    ):
        assert found[f"workers/{name}/0"] == found[f"workers/{name}/least"] == one
        assert found[f"workers/{name}/1"] == found[f"workers/{name}/largest"] == other
        assert Gauge.shown[f"distpc_worker_{name}", "b:2"] == other
    assert found["workers/lost"] == Gauge.shown["distpc_workers_lost", None] == 1.0
    assert found["workers/samples_per_second"] > 0


def test_a_tally_of_nothing(tmp_path: Path) -> None:
    with Tally("fit", tmp_path) as tally:
        pass
    assert tally.to_json()["most_workers"] == 0 and tally.to_json()["wall_seconds"] == 0.0


def scalars(folder: Path) -> dict[str, Any]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
