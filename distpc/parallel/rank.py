"""One process of `launch.run_ranks`: python -m distpc.parallel.rank ARGUMENTS, which are

TARGET PAYLOAD_FILE LOG_FOLDER RANK THREADS LOST_SECONDS COLLECTIVE_SECONDS PARENT
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distpc.errors import ResourceError
from distpc.parallel.failures import DISK_FULL, write_failure
from distpc.parallel.processes import die_with_parent, end_process

if TYPE_CHECKING:
    from distpc.parallel.mesh import Mesh


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


def call(target: str, payload: dict[str, Any], mesh: Mesh) -> None:
    """Call `target(payload, mesh)`, in the process group.

    Raises:
        TrainingError: a collective operation waited too long for other ranks.
        Exception: of the target.
    """
    from distpc.parallel import collectives

    with collectives.waits_told(mesh):
        import_target(target)(payload, mesh)


@contextlib.contextmanager
def joined_mesh(collective_seconds: float, num_threads: int | None = None) -> Iterator[Mesh]:
    """This process's mesh, in its process group for the length of the block."""
    # Imported here so that the parent's death is watched before seconds go into importing torch.
    import torch

    from distpc.parallel import collectives
    from distpc.parallel.mesh import Mesh

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    mesh = Mesh.from_environment()
    collectives.start(mesh, seconds=collective_seconds)
    try:
        yield mesh
    finally:
        collectives.finish()


@contextlib.contextmanager
def _signs_of_life(rank: int, lost_seconds: float) -> Iterator[None]:
    """Inside, the process that started this one sees that it lives, and whether it moves."""
    import torch.distributed as dist

    from distpc.parallel.pulse import Pulse

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with Pulse(dist.TCPStore(host, port, is_master=False), rank, lost_seconds):
        yield


def main(arguments: list[str]) -> int:
    """Run the target that the arguments name; leave any error as JSON for the launcher."""
    target, payload_file, log_folder, rank, num_threads, lost_seconds, seconds, parent = arguments
    die_with_parent(int(parent))
    payload = json.loads(Path(payload_file).read_text())
    try:
        with _signs_of_life(int(rank), float(lost_seconds)):
            # The target's own imports may take as long as they need.
            import_target(target)
            with joined_mesh(float(seconds), int(num_threads)) as mesh:
                try:
                    call(target, payload, mesh)
                except (Exception, SystemExit) as error:
                    # Before leaving the group, which makes the other ranks fail in their turn.
                    return _leave(error, Path(log_folder), int(rank))
    except Exception as error:
        return _leave(error, Path(log_folder), int(rank))
    return 0


def _leave(error: BaseException, log_folder: Path, rank: int) -> int:
    """Write `error` for the launcher, unless the one that caused it is there already.

    Returns:
        The exit status, which is all that a full disk lets this process say.
    """
    if error_file(log_folder, rank).exists():
        return 1
    try:
        write_failure(error_file(log_folder, rank), error)
    except ResourceError:
        return DISK_FULL
    # The error is told; a disk that has no room for its log as well must not hide it.
    with contextlib.suppress(OSError), log_file(log_folder, rank).open("a") as log:
        traceback.print_exception(error, file=log)
    return 1


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
