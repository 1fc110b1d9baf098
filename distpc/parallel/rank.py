"""One process of `launch.run_ranks`:

python -m distpc.parallel.rank TARGET PAYLOAD_FILE LOG_FOLDER RANK THREADS PARENT
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distpc.parallel.failures import write_failure
from distpc.parallel.processes import die_with_parent


def error_file(log_folder: Path, rank: int) -> Path:
    """Where a rank leaves the error that ended it."""
    return log_folder / f"error-{rank}.json"


def log_file(log_folder: Path, rank: int) -> Path:
    """Where a rank writes its output (rank 0, whose output is the terminal's: its errors)."""
    return log_folder / f"rank-{rank}.log"


def import_target(target: str) -> Callable[..., Any]:
    """The object that `module:name` names.

    Raises:
        ValueError: `target` has not that form.
    """
    module, separator, name = target.partition(":")
    if not separator:
        raise ValueError(f"'{target}' is not of the form module:name")
    return getattr(importlib.import_module(module), name)


def run_target(target: str, payload: dict[str, Any], num_threads: int | None = None) -> None:
    """Call the target as this rank, between joining and leaving the process group."""
    # Imported here so that the parent's death is watched before seconds go into importing torch.
    import torch

    from distpc.parallel import collectives
    from distpc.parallel.mesh import Mesh

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    mesh = Mesh.from_environment()
    function = import_target(target)
    collectives.start(mesh)
    try:
        function(payload, mesh)
    finally:
        collectives.finish()


def main(arguments: list[str]) -> int:
    """Run the target that the arguments name; leave any error as JSON for the launcher."""
    target, payload_file, log_folder, rank, num_threads, parent = arguments
    die_with_parent(int(parent))
    try:
        run_target(target, json.loads(Path(payload_file).read_text()), int(num_threads))
    except Exception as error:
        # The file comes first: closing connections makes the other ranks fail in their turn.
        write_failure(error_file(Path(log_folder), int(rank)), error)
        with log_file(Path(log_folder), int(rank)).open("a") as log:
            traceback.print_exc(file=log)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
