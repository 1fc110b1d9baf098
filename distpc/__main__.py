"""The program `distpc`, also run as a module: python -m distpc."""

import sys
from typing import NoReturn

from distpc.cli import main


def run() -> NoReturn:
    """Run the command line and end this process with its exit code."""
    code = main()
    if "torch" in sys.modules:
        from distpc.parallel.mesh import is_rank
        from distpc.parallel.processes import end_process

        if is_rank():
            end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
