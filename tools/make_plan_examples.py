"""Runs the `distpc plan` commands of docs/plan.md and puts what they print below them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from distpc.cli import main

DOCUMENT = Path(__file__).parent.parent / "docs" / "plan.md"
BLOCK = re.compile(r"```console\n\$ distpc (?P<command>(?:.*\\\n)*.*)\n(?:(?!```).*\n)*```")


def printed(arguments: list[str]) -> str:
    """Both streams of one command."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        main(arguments)
    return stream.getvalue().rstrip()


def rerun(block: re.Match[str]) -> str:
    """The block with what its command prints now."""
    command = block["command"]
    output = printed(shlex.split(command.replace("\\\n", " ")))
    return f"```console\n$ distpc {command}\n{output}\n```"


if __name__ == "__main__":
    DOCUMENT.write_text(BLOCK.sub(rerun, DOCUMENT.read_text()))
    print(f"wrote {DOCUMENT}")
