import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distpc.parallel.progress import Progress

SCRIPT = """
from distpc.parallel.progress import Progress
with Progress("finetune", 10, "samples") as progress:
    progress.advance(4)
    progress.say("step 4  valid 2.5")
    progress.advance(6)
"""


def test_a_line_does_not_run_into_the_bar() -> None:
    main, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(main, 4096)
        except OSError:
            # The terminal's other end is closed.
            break
    os.close(main)
    assert done.wait(timeout=60) == 0
    assert "step 4  valid 2.5" in re.split(r"[\r\n]+", shown.decode())
    assert "10/10" in shown.decode()


def test_a_line_stands_alone_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("finetune", 10, "samples").say("step 4  valid 2.5")
    assert capsys.readouterr().err == "step 4  valid 2.5\n"
