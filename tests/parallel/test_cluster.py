import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from parallel_processes import (
    DRIVERS,
    alive,
    descendants,
    listening,
    ports_of,
    start_driver,
    wait_until,
)

from distpc.artifacts.files import write_json
from distpc.config.schema import ParallelConfig
from distpc.errors import DataError, DistpcError, ResourceError
from distpc.parallel import reaper
from distpc.parallel.cluster import Cluster, check_room
from distpc.parallel.items import ItemQueue
from distpc.parallel.launch import alone
from distpc.parallel.placement import LOST
from distpc.parallel.tally import Tally

ADDER = "parallel_targets:Adder"


def bare_environment(folder: Path) -> dict[str, str]:
    """An environment that knows neither the package nor a cluster; temporary files in `folder`."""
    hidden = ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**environment, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One small local cluster for all tests that leave it whole."""
    before = os.environ.pop("RAY_ADDRESS", None)
    with Cluster.connect(ParallelConfig(num_workers=2, cpus_per_worker=0.5)) as connected:
        yield connected
    if before is not None:
        os.environ["RAY_ADDRESS"] = before


@pytest.fixture(scope="module")
def kwargs(cluster: Cluster) -> dict[str, Any]:
    return {"base": cluster.put(torch.ones(10))}


def test_results_come_with_their_index(cluster: Cluster, kwargs: dict[str, Any]) -> None:
    shared = cluster.put(100.0)
    items = [{"value": value, "more": [shared, 0.5]} for value in range(5)]
    results = dict(cluster.map(ADDER, kwargs, items))
    assert results == {index: 110.5 + index for index in range(5)}


def test_a_pool_keeps_its_workers_and_their_items(
    cluster: Cluster, kwargs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.pool(ADDER, kwargs) as pool:
        # Both workers are up before any item finds its home.
        wait_until(
            lambda: len(set(dict(pool.map(range(6), method="who")).values())) == 2, 60, "two"
        )
        needs = list("abcdef")
        first = dict(pool.map(range(6), method="who", label="asking", needs=needs))
        # Calls that need nothing, or other things, take no item away from its worker.
        list(pool.map(range(3), method="who"))
        list(pool.map(range(3), method="who", needs=["x", None, "y"]))
        second = dict(pool.map(range(6), method="who", needs=needs))
    assert {threads for _, threads in first.values()} == {1}
    workers = {process for process, _ in first.values()}
    assert len(workers) <= 2
    assert {process for process, _ in second.values()} <= workers
    # An idle worker may help out a busy one at the end, no more.
    assert sum(first[index] == second[index] for index in range(6)) >= 4
    assert "asking: 6/6 items in " in capsys.readouterr().err


def test_there_are_no_more_workers_than_items(cluster: Cluster, kwargs: dict[str, Any]) -> None:
    with cluster.pool(ADDER, kwargs) as pool:
        assert len(dict(pool.map([0], method="who"))) == 1
        assert pool.num_workers == 1
    assert list(cluster.map(ADDER, kwargs, [])) == []


def test_an_own_error_arrives_as_itself(cluster: Cluster, kwargs: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        list(cluster.map(ADDER, kwargs, [{"value": 0, "error": "own"}]))
    error = caught.value
    assert (error.what, error.where) == ("a shard is cut", "train-7")
    assert (error.found, error.expected, error.fix) == ("3", "4", "mend it")


def test_another_error_names_item_and_cause(cluster: Cluster, kwargs: dict[str, Any]) -> None:
    with pytest.raises(DistpcError) as caught:
        list(cluster.map(ADDER, kwargs, [{"value": 12345, "error": "other"}]))
    assert "KeyError: 'the cause'" in str(caught.value)
    assert "12345" in str(caught.value.where)
    with pytest.raises(DistpcError, match="cannot be constructed"):
        list(cluster.map(ADDER, {**kwargs, "fail": True}, [{"value": 0}]))


def test_a_killed_worker_changes_no_result(
    cluster: Cluster, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"

    def kill() -> None:
        wait_until(lambda: mark.is_file() and mark.read_text(), 60, "an item to begin")
        os.kill(int(mark.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    items: list[dict[str, Any]] = [{"value": value} for value in range(4)]
    items[1]["mark"] = str(mark)
    results = dict(cluster.map(ADDER, kwargs, items))
    killer.join()
    assert results == {index: 10.0 + index for index in range(4)}
    assert mark.is_file()


def test_an_item_that_kills_its_workers_is_named(cluster: Cluster, kwargs: dict[str, Any]) -> None:
    items = [{"value": 12345, "error": "death"}]
    with pytest.raises(ResourceError) as caught:
        list(cluster.map(ADDER, kwargs, items, retries=1))
    assert "2 workers in a row died" in str(caught.value)
    assert "12345" in str(caught.value.where)


def test_training_ranks_wait_for_a_place_no_longer_than_they_may(cluster: Cluster) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match="gave no place to 64 training ranks") as caught:
        cluster.rank_hosts(64, 1, seconds=1.0)
    assert time.monotonic() - started < 20
    assert f"{os.cpu_count()} CPUs" in str(caught.value.found)
    assert "join_seconds=1" in str(caught.value.expected)
    assert "parallel.num_ranks" in str(caught.value.fix)


def test_a_rank_that_goes_with_its_machine_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "payload.json").write_text(json.dumps({"out": str(tmp_path)}))
    target, payload = "parallel_targets:wait_alone", str(tmp_path / "payload.json")
    hosts = cluster.rank_hosts(1, 1, seconds=60)
    # What a launcher holds: the ranks' signs of life go there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        placed = hosts.start(
            [target, payload, str(tmp_path), "0", "1", "60", "60"],
            {**alone(), **environment},
            tmp_path / "rank-0.log",
        )
        pids = tmp_path / "pids"
        wait_until(lambda: pids.is_file() and pids.read_text(), 90, "the rank")
        assert placed.poll() is None
        rank, host = map(int, pids.read_text().split())
        os.kill(host, signal.SIGKILL)
        wait_until(lambda: placed.poll() is not None, 60, "its loss to be seen")
        assert placed.poll() == LOST
        wait_until(lambda: not psutil.pid_exists(rank), 10, "the rank to end with it")
    finally:
        hosts.close()


def test_a_request_beyond_this_machine_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        Cluster.connect(ParallelConfig(num_workers=4096))
    assert time.monotonic() - started < 2
    assert f"{os.cpu_count()} CPUs" in str(caught.value.found)
    assert "4096 CPUs" in str(caught.value.expected)
    assert str(caught.value.fix) == f"set parallel.num_workers={os.cpu_count()}"


def test_gpus_that_are_not_there_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        Cluster.connect(ParallelConfig(num_workers=3, cpus_per_worker=0.1, gpus_per_worker=0.5))
    assert time.monotonic() - started < 2
    assert caught.value.where == "parallel.gpus_per_worker"
    assert "and 1 GPUs on 1 machine(s): room for 2 workers" in str(caught.value.found)
    assert "0.5 GPUs = 0.3 CPUs and 1.5 GPUs" in str(caught.value.expected)


def test_room_is_counted_by_machine() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0}]
    check_room(ParallelConfig(num_workers=2, cpus_per_worker=2), nodes, "here")
    check_room(ParallelConfig(num_workers=20, cpus_per_worker=0.3), nodes, "here")
    check_room(ParallelConfig(num_workers=2, gpus_per_worker=0.5), nodes, "here")
    for request in (
        ParallelConfig(num_workers=3, cpus_per_worker=2),
        ParallelConfig(num_workers=1, cpus_per_worker=4),
        ParallelConfig(num_workers=2, gpus_per_worker=1),
    ):
        with pytest.raises(ResourceError, match="has no room for"):
            check_room(request, nodes, "here")


def test_items_go_home_first() -> None:
    queue = ItemQueue(5, {0: 0, 1: 0, 2: 1})
    assert [queue.next_for(1), queue.next_for(1), queue.next_for(1)] == [2, 3, 4]
    assert [queue.next_for(1), queue.next_for(0), queue.next_for(0)] == [1, 0, None]


def test_nothing_is_left_of_a_killed_driver(tmp_path: Path) -> None:
    folder = Path("/tmp") if len(str(tmp_path)) > 40 else tmp_path
    environment = bare_environment(folder)
    driver = start_driver("sleeping_cluster", str(tmp_path), cwd=tmp_path, environment=environment)
    mark = tmp_path / "mark"
    wait_until(lambda: mark.is_file() and mark.read_text(), 90, "a worker with an item")
    processes = descendants(driver.pid)
    names = " ".join(" ".join(process.cmdline()) for process in processes)
    for expected in ("gcs_server", "raylet", "ray::DashboardAgent", "_Host", "reaper.py"):
        assert expected in names
    worker = psutil.Process(int(mark.read_text()))
    assert worker in processes
    reapers = [process for process in processes if "reaper.py" in " ".join(process.cmdline())]
    cluster_folder = Path(reapers[0].cmdline()[-2])
    assert cluster_folder.is_dir()
    ports = ports_of(processes)
    assert ports
    driver.kill()
    driver.communicate(timeout=30)
    wait_until(lambda: not alive(processes), 15, "the cluster to be gone")
    wait_until(lambda: not ports & listening(), 5, "the ports to be free")
    assert not cluster_folder.exists()


def test_nothing_is_left_after_an_ordinary_end_and_nothing_is_said(tmp_path: Path) -> None:
    driver = start_driver("mapping", "2", cwd=tmp_path, environment=bare_environment(Path("/tmp")))
    seen: dict[int, psutil.Process] = {}
    while driver.poll() is None:
        try:
            seen |= {process.pid: process for process in descendants(driver.pid)}
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    output, _ = driver.communicate()
    assert output == "[(0, 2.0), (1, 3.0), (2, 4.0), (3, 5.0)]\n"
    assert driver.returncode == 0
    assert len(seen) > 5
    wait_until(lambda: not alive(list(seen.values())), 5, "the cluster to be gone")


@pytest.fixture
def existing_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster that somebody else started; the environment to find it."""
    folder = Path("/tmp", f"ray-test-{os.getpid()}")
    environment = bare_environment(Path("/tmp")) | {"RAY_AUTH_MODE": "disabled"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    reaper.sweep(folder)


def test_an_existing_cluster_is_joined_and_left_alone(
    existing_cluster: dict[str, str], tmp_path: Path
) -> None:
    def run(num_workers: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(DRIVERS), "mapping", num_workers]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    port = int(existing_cluster["RAY_ADDRESS"].rpartition(":")[2])
    joined = run("2", existing_cluster)
    assert joined.stdout == "[(0, 2.0), (1, 3.0), (2, 4.0), (3, 5.0)]\n", joined.stderr
    assert port in listening()

    refused = run("64", existing_cluster)
    assert refused.returncode == 3
    assert "ResourceError the Ray cluster at 127.0.0.1" in refused.stdout
    assert "2 CPUs" in refused.stdout
    assert "64 CPUs" in refused.stdout
    assert port in listening()


@pytest.mark.slow
def test_figures_of_ranks_reach_ray(cluster: Cluster, tmp_path: Path) -> None:
    """As the metrics that a node of the cluster exports for Prometheus, half a minute later."""
    import ray  # Not before the cluster has chosen how it asks who speaks to it.

    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    path = tmp_path / "figures.json"
    gauges = cluster.gauges(path, "finetune")
    gauges.pass_on()
    write_json(path, {"ranks": [{"tflops": 1.5}, {"tflops": 2.5}]})
    gauges.pass_on()
    gauges.lost([1])
    tally = Tally("features")
    with tally:
        began = time.monotonic()
        items = [{"value": 1, "seconds": 0.2}]
        with cluster.pool(ADDER, {"base": torch.ones(2)}, tally=tally) as pool:
            list(pool.map(items, method="slow"))
            one, before = time.monotonic(), dict(tally.seconds)
            list(pool.map(items * 5, method="slow"))
    facts = tally.to_json()
    assert facts["lost_workers"] == 0 and 1 <= facts["most_workers"] <= 2
    assert 1.2 <= facts["seconds"]["compute"] < 2.0
    assert sum(before.values()) <= one - began
    # Every worker's time, less what it was idle after its last call.
    assert sum(facts["seconds"].values()) <= facts["most_workers"] * facts["wall_seconds"] + 0.5
    assert sum(facts["seconds"].values()) >= 1.2

    def exported() -> list[str]:
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if line.startswith("ray_distpc_")]

    def seen(name: str) -> list[str]:
        return [line for line in exported() if line.startswith(f"ray_distpc_{name}")]

    wanted = ("tflops", "rank_lost", "worker_compute_seconds", "worker_peak_memory_bytes")
    wait_until(lambda: all(map(seen, wanted)), 60, "the figures to be exported")
    computing = seen("worker_compute_seconds")
    assert all('stage="features"' in line and 'worker="' in line for line in computing)
    found = sum(float(line.split()[-1]) for line in computing)
    assert found == pytest.approx(facts["seconds"]["compute"], abs=0.01)
    for name, rank, value in (("tflops", 0, 1.5), ("tflops", 1, 2.5), ("rank_lost", 1, 1.0)):
        (line,) = [
            line
            for line in exported()
            if line.startswith(f"ray_distpc_{name}") and f'rank="{rank}"' in line
        ]
        assert 'stage="finetune"' in line and float(line.split()[-1]) == value
