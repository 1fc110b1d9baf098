"""Run distpc as a module: python -m distpc."""

import sys

from distpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
