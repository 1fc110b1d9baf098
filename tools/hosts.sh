#!/usr/bin/env bash
# Several hosts for real, on this machine.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment core
DISTPC_VENV="$VENV" exec "$VENV/bin/python" "$REPO/tools/hosts" "$@"
