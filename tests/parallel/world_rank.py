"""One rank of test_launch_world: python world_rank.py WHAT FOLDER [FACT]"""

import os
import sys
import time
from pathlib import Path

from distpc.config.schema import ParallelConfig
from distpc.errors import DataError, DistpcError
from distpc.parallel.launch import run_ranks
from distpc.parallel.world import World


def run(target: str, folder: Path) -> None:
    run_ranks(
        f"parallel_targets:{target}",
        {"out": str(folder), "text": ""},
        num_ranks=7,
        threads_per_rank=1,
        log_folder=folder / "logs",
    )


def lead(what: str, folder: Path) -> None:
    if what == "calls":
        for call in ("first", "second"):
            (folder / call).mkdir()
            run("use_collectives", folder / call)
    elif what == "stage fails":
        raise DataError("a shard is cut", where="train-7", fix="write it anew")
    elif what == "call fails":
        run("raise_own_error", folder)
    elif what == "call skips":
        run("skip_a_collective", folder)
    else:
        (folder / "leads").write_text(str(os.getpid()))
        time.sleep(120)


def main(what: str, folder: Path, fact: str = "alike") -> int:
    parallel = ParallelConfig(
        join_seconds=5 if what == "joins" else 60,
        lost_seconds=4,
        collective_seconds=2.5 if what == "call skips" else 60,
    )
    try:
        with World.joined(parallel, {"config": {"finetune": {"num_epochs": fact}}}) as world:
            if world.leads:
                lead(what, folder)
            else:
                (folder / "follows").write_text(str(os.getpid()))
                world.follow()
    except DistpcError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
