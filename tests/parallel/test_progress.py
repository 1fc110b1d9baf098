import os
import pty
import subprocess
import sys

import pytest

from distpc.parallel import progress
from distpc.parallel.processes import python_path
from distpc.parallel.progress import Progress, track


def test_a_log_gets_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), 3, "counting", unit="numbers")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("counting: 3/3 numbers in ")


def test_a_log_gets_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress("training", unit="steps") as bar:
        bar.advance(2, bpd=1.23456789)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("training: 2 steps in ")
    assert lines[0].endswith("bpd 1.235")


def test_only_rank_0_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(track(range(3), label="counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    code = "from distpc.parallel.progress import track; list(track(range(3), 3, 'counting'))"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "counting: 100%" in text
    assert "\r" in text
