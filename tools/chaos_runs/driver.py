"""The command that chaos interrupts: one run's stages up to `assign`.

python tools/chaos_runs/driver.py CONFIG RUN_FOLDER
"""

import sys
from pathlib import Path

from distpc.config import load_config
from distpc.errors import DistpcError
from distpc.pipeline.runner import Pipeline

if __name__ == "__main__":
    try:
        Pipeline(load_config(Path(sys.argv[1]), []), Path(sys.argv[2])).run_until("assign")
    except DistpcError as error:
        sys.exit(f"{type(error).__name__}: {error}")
