"""One run of a comparison, in a process of its own: `python -m ...job CONFIG OUT [STAGE]`.

With a stage it stops after that one. What the stages start (workers, ranks) runs on the Ray
cluster that RAY_ADDRESS names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from distpc.config import load_config
from distpc.errors import DistpcError
from distpc.parallel.processes import die_with_parent
from distpc.pipeline.runner import Pipeline


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 2 for an error that the user can mend, which is the last line."""
    die_with_parent(os.getppid())
    config, out, *until = arguments
    print(f"[distpc] {torch.get_num_threads()} threads in the job's own process", flush=True)
    pipeline = Pipeline(load_config(Path(config)), Path(out))
    try:
        if until:
            pipeline.run_until(until[0])
        else:
            pipeline.run()
    except DistpcError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
