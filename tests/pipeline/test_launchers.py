"""The same configuration and command, started by each launcher, gives the same result."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from distpc.parallel import reaper
from distpc.parallel.processes import python_path

ROOT = Path(__file__).parents[2]
HCLT = [
    str(ROOT / "configs" / "digits_hclt.yaml"),
    *["structure.num_states=4", "finetune.num_epochs=2", "evaluate.num_pictures=4"],
]
DIGITS = [
    str(ROOT / "configs" / "digits.yaml"),
    *["teacher.mae.num_epochs=1", "latents.num_clusters=16", "finetune.num_epochs=3"],
    *["evaluate.num_pictures=4"],
]
NOT_PERMITTED = 77
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **variables}


def torchrun(num_ranks: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--local-addr", "127.0.0.1", "--nproc-per-node", str(num_ranks), "-m"]


def deepspeed() -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [*launcher, *address, "--no_local_rank", "--module"]


def run(launcher: list[str], out: Path, arguments: list[str], **variables: str) -> dict[str, Any]:
    command = [*launcher, "distpc", "run", *arguments, "--out", str(out)]
    result = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def alone_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run([sys.executable, "-m"], out, [*HCLT, "parallel.num_ranks=1"])
    return out


def test_torchrun_gives_what_one_process_gives(alone_run: Path, tmp_path: Path) -> None:
    alone = json.loads((alone_run / "report.json").read_text())
    ranks = run(torchrun(), tmp_path / "ranks", [*HCLT, "parallel.num_ranks=5"])
    assert ranks["test_bpd"] == pytest.approx(alone["test_bpd"], abs=1e-4)
    assert ranks["ranks"] == {"started_by": "torchrun", "num_ranks": 2, "configured": 5}
    assert ranks["config"]["parallel"]["num_ranks"] == 2


def test_torchrun_closes_with_the_error_that_ended_a_rank(tmp_path: Path) -> None:
    command = [*torchrun(), "distpc", "run", HCLT[0], "finetune.batch_size=1"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    told, report = result.stderr.split("Root Cause (first observed failure):")
    assert "distpc: ConfigError: a batch has fewer samples than there are ranks" in told
    assert "traceback : ConfigError: a batch has fewer samples" in report
    assert "1 samples, 2 ranks" in report and "To enable traceback" not in report
    # The other rank only ended with it.
    assert result.stderr.count("a batch has fewer samples") == 2


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run([sys.executable, "-m"], tmp_path_factory.mktemp("runs") / "local", DIGITS)


@pytest.mark.slow
def test_digits_under_torchrun(local: dict[str, Any], tmp_path: Path) -> None:
    report = run(torchrun(), tmp_path / "digits", DIGITS)
    assert report["test_bpd"] == pytest.approx(local["test_bpd"], abs=1e-4)


@pytest.mark.slow
def test_digits_under_deepspeed(local: dict[str, Any], tmp_path: Path) -> None:
    report = run(deepspeed(), tmp_path / "digits", DIGITS, DS_ACCELERATOR="cpu")
    assert report["test_bpd"] == pytest.approx(local["test_bpd"], abs=1e-4)
    assert report["ranks"]["started_by"] == "deepspeed"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables to reach a cluster of its own, started by `ray start --head`, with a token."""
    pytest.importorskip("aiohttp", reason="`ray job submit` needs distpc[jobs]")
    folder = Path(f"/tmp/ray-test-{os.getpid()}").resolve()
    dashboard = free_port()
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    start = [*RAY, "start", "--head", "--node-ip-address", "127.0.0.1", "--num-cpus", "2"]
    start += ["--port", str(free_port()), "--dashboard-port", str(dashboard)]
    start += ["--temp-dir", str(folder)]
    try:
        subprocess.run(
            start, env=environment(**variables), check=True, capture_output=True, timeout=300
        )
        # It answers before it takes jobs.
        trial = [*RAY, "job", "submit", "--", "true"]
        wait_for(lambda: not subprocess.run(trial, env=environment(**variables)).returncode, 60)
        yield variables
    finally:
        reaper.sweep(folder)


@pytest.mark.slow
def test_digits_as_a_ray_job(
    local: dict[str, Any], cluster: dict[str, str], tmp_path: Path
) -> None:
    submit = [*RAY, "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, "-m"]
    report = run(submit, tmp_path / "digits", DIGITS, **cluster)
    assert report["test_bpd"] == pytest.approx(local["test_bpd"], abs=1e-4)
    assert report["ranks"]["started_by"] == "ray"


def hosts(*arguments: str, seconds: float) -> None:
    """tools/hosts.sh, where network namespaces are permitted."""
    result = subprocess.run(
        [str(ROOT / "tools" / "hosts.sh"), *arguments],
        env=environment(DISTPC_VENV=sys.prefix),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    print(result.stdout)
    if result.returncode == NOT_PERMITTED:
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all held" in result.stdout


def test_two_hosts_of_which_one_is_cut_off(alone_run: Path) -> None:
    hosts("--quick", str(alone_run), seconds=600)


@pytest.mark.slow
def test_three_hosts_with_ray_and_torchrun() -> None:
    hosts(seconds=3600)


def test_a_machine_that_never_comes_ends_the_wait(tmp_path: Path) -> None:
    variables = {"NNODES": "2", "NPROC": "1", "RDZV": f"127.0.0.1:{free_port()}"}
    variables |= {"LOCAL_ADDR": "127.0.0.1", "JOIN_SECONDS": "3", "MAX_RESTARTS": "0"}
    result = subprocess.run(
        [str(ROOT / "launch" / "torchrun.sh"), *HCLT, "--out", str(tmp_path / "run")],
        env=environment(DISTPC_VENV=sys.prefix, **variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "waits up to 3 s (JOIN_SECONDS) for 2 machines at 127.0.0.1:" in result.stderr
    assert "RendezvousTimeoutError" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(tmp_path: Path) -> None:
    """The agent stays, starts all ranks again, and they go on from the last checkpoint."""
    arguments = [*HCLT, "finetune.num_epochs=6", "finetune.checkpoint_every_seconds=0"]
    whole = run([sys.executable, "-m"], tmp_path / "whole", arguments)
    out = tmp_path / "killed"
    script = [str(ROOT / "launch" / "torchrun.sh"), *arguments, "--out", str(out)]
    with (tmp_path / "log.txt").open("w") as log:
        agent = subprocess.Popen(
            script, env=environment(DISTPC_VENV=sys.prefix, NPROC="2"), stdout=log, stderr=log
        )
    try:
        for _ in range(2):
            kill_rank_1(agent.pid, out / "finetune" / "checkpoints")
        assert agent.wait(600) == 0, (tmp_path / "log.txt").read_text()[-4000:]
    finally:
        agent.kill()
        agent.wait()
    report = json.loads((out / "report.json").read_text())
    assert report["test_bpd"] == pytest.approx(whole["test_bpd"], abs=1e-4)
    training = json.loads((out / "finetune" / "training.json").read_text())
    assert training["resumed_at_step"] > 0


def kill_rank_1(agent: int, checkpoints: Path) -> None:
    """Once there is a new checkpoint; until the agent has ended the other rank."""
    trained = "step-*[1-9]*"
    before = set(checkpoints.glob(trained))
    wait_for(lambda: set(checkpoints.glob(trained)) - before, 300)
    ranks = ranks_of(agent)
    assert sorted(ranks) == [0, 1]
    ranks[1].kill()
    wait_for(lambda: not is_alive(ranks[0]), 60)


def ranks_of(agent: int) -> dict[int, psutil.Process]:
    """The ranks that a torchrun agent has started."""
    children = psutil.Process(agent).children()
    return {int(child.environ()["RANK"]): child for child in children}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun(), deepspeed()], ids=["torchrun", "deepspeed"])
def test_a_killed_launcher_leaves_nothing_and_another_world_continues(
    launcher: list[str], tmp_path: Path
) -> None:
    arguments = [*HCLT, "finetune.num_epochs=6", "finetune.checkpoint_every_seconds=0"]
    whole = run([sys.executable, "-m"], tmp_path / "whole", arguments)
    out = tmp_path / "killed"
    command = [*launcher, "distpc", "run", *arguments, "--out", str(out)]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, env=environment(DS_ACCELERATOR="cpu"), stdout=log, stderr=log
        )
    wait_for(lambda: any((out / "finetune" / "checkpoints").glob("*")), 300)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(is_alive(member) for member in family), 30)
    report = run(torchrun(3), out, arguments)
    assert report["test_bpd"] == pytest.approx(whole["test_bpd"], abs=1e-4)
    assert report["stages"]["structure"]["skipped"]


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.s*")), ids=lambda p: p.name)
def test_the_scripts_parse_and_fit_one_screen(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert len(script.read_text().splitlines()) <= 50


def test_the_kubernetes_job_parses() -> None:
    text = (ROOT / "launch" / "kuberay.yaml").read_text()
    job = yaml.safe_load(text)
    assert job["kind"] == "RayJob" and "distpc run" in job["spec"]["entrypoint"]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    assert container["volumeMounts"][0]["mountPath"] == "/shared"
    assert len(text.splitlines()) <= 50
