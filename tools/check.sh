#!/usr/bin/env bash
# Static checks: ruff (lint and format), mypy on the package, the layering of imports.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment dev
cd "$REPO"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest -q tests/test_layering.py
