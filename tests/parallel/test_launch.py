import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from parallel_processes import (
    alive,
    descendants,
    listening,
    ports_of,
    start_driver,
    wait_until,
)

from distpc.errors import DataError, ResourceError, TrainingError
from distpc.parallel.launch import run_ranks
from distpc.parallel.processes import python_path


def run(target: str, folder: Path, num_ranks: int = 2) -> None:
    run_ranks(
        f"parallel_targets:{target}",
        {"out": str(folder)},
        num_ranks=num_ranks,
        threads_per_rank=1,
        log_folder=folder / "logs",
    )


def start_waiting_ranks(folder: Path) -> tuple["subprocess.Popen[str]", list[int]]:
    """A driver process whose two ranks wait, and the ranks' process ids."""
    driver = start_driver("ranks", str(folder), cwd=folder, environment=dict(os.environ))
    files = [folder / f"{rank}.pid" for rank in range(2)]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files), 90, "ranks")
    return driver, [int(file.read_text()) for file in files]


def test_only_rank_0_speaks_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = descendants(os.getpid())
    run("speak", tmp_path)
    assert capfd.readouterr().err == "rank 0 of 2 speaks\n"
    assert "rank 1 of 2 speaks" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert descendants(os.getpid()) == before


def test_an_own_error_arrives_as_itself(tmp_path: Path) -> None:
    before = descendants(os.getpid())
    with pytest.raises(DataError) as caught:
        run("raise_own_error", tmp_path)
    error = caught.value
    assert (error.what, error.where) == ("a shard is cut", "train-7")
    assert (error.found, error.expected, error.fix) == ("3", "4", "write it anew")
    assert descendants(os.getpid()) == before


def test_any_other_error_names_the_rank_that_began(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run("raise_other_error", tmp_path)
    text = str(caught.value)
    assert "training rank 1 of 2 failed: RuntimeError: the cause" in text
    assert str(tmp_path / "logs" / "rank-1.log") in text
    assert 'raise RuntimeError("the cause")' in text
    assert "the cause" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_rank_without_room_for_its_error_names_the_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no space"):
        run("fail_on_a_full_disk", tmp_path)


def test_an_exit_status_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run("exit_with_status", tmp_path)
    assert "training rank 1 of 2 failed: SystemExit: 7" in str(caught.value)
    assert "last words" in (tmp_path / "logs" / "rank-1.log").read_text()


def run_until_lost(target: str, folder: Path) -> tuple[TrainingError, float]:
    """The error, and after how many seconds it came."""
    before, began = descendants(os.getpid()), time.monotonic()
    with pytest.raises(TrainingError) as caught:
        run_ranks(
            f"parallel_targets:{target}",
            {"out": str(folder), "lost_seconds": 2.5},
            num_ranks=2,
            threads_per_rank=1,
            log_folder=folder / "logs",
            lost_seconds=2.5,
        )
    assert descendants(os.getpid()) == before
    return caught.value, time.monotonic() - began


def test_a_stopped_rank_is_given_up(tmp_path: Path) -> None:
    error, seconds = run_until_lost("stop", tmp_path)
    assert error.what.startswith("training rank 1 of 2 has given no sign of life for 3 s")
    assert error.expected is not None and "2.5 s (parallel.lost_seconds)" in error.expected
    # Most of it is the start.
    assert seconds < 60


def test_a_rank_that_is_stuck_is_given_up_and_one_that_computes_or_waits_is_not(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    error, _ = run_until_lost("compute_then_read", tmp_path)
    assert (tmp_path / "computed-0").is_file() and (tmp_path / "computed-1").is_file()
    assert error.what.startswith("training rank 1 of 2 has stood still for")
    assert "in read_bytes" in str(error.found) or "in open" in str(error.found)


def test_a_rank_that_leaves_out_an_operation_ends_the_run(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TrainingError) as caught:
        run_ranks(
            "parallel_targets:skip_a_step",
            {"out": str(tmp_path)},
            num_ranks=2,
            threads_per_rank=1,
            log_folder=tmp_path / "logs",
            collective_seconds=2.5,
        )
    # Most of it is the start.
    assert time.monotonic() - began < 110
    text = str(caught.value)
    assert "of 2 waited in vain for the others" in text
    assert "not all of them within 2.5 s (parallel.collective_seconds)" in text
    assert "in skip_a_step" in text


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    driver, ranks = start_waiting_ranks(tmp_path)
    processes = [psutil.Process(rank) for rank in ranks]
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = driver.communicate(timeout=30)
    assert time.monotonic() - killed < 10
    assert driver.returncode == 3
    assert "TrainingError training rank 1 of 2 was ended by signal 9 (Killed" in output
    assert alive(processes) == []


def test_ranks_and_ports_die_with_a_killed_driver(tmp_path: Path) -> None:
    driver, ranks = start_waiting_ranks(tmp_path)
    processes = [psutil.Process(driver.pid), *descendants(driver.pid)]
    assert set(ranks) <= {process.pid for process in processes}
    ports = ports_of(processes)
    assert ports
    driver.kill()
    driver.communicate(timeout=30)
    wait_until(lambda: not alive(processes), 10, "the ranks to be gone")
    wait_until(lambda: not ports & listening(), 5, "the ports to be free")


def test_a_process_that_is_a_rank_calls_the_target_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from pathlib import Path; from distpc.parallel.launch import run_ranks; "
        "run_ranks('parallel_targets:use_collectives', {'out': sys.argv[1], 'text': ''}, "
        "num_ranks=7, threads_per_rank=1, log_folder=Path(sys.argv[1]))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", str(script), str(tmp_path)]
    subprocess.run(launcher, env=environment, check=True, timeout=120)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0.json", "1.json"]


def test_a_process_ends_with_its_buffers_written_and_its_threads_joined() -> None:
    program = textwrap.dedent(
        """
        import atexit, sys, threading, time
        from distpc.parallel.processes import end_process

        def late():
            time.sleep(0.2)
            print("thread")

        atexit.register(lambda: print("atexit"))
        threading.Thread(target=late).start()
        sys.stdout.write("begun ")
        end_process(3)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "begun thread\natexit\n")
