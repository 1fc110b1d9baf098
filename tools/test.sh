#!/usr/bin/env bash
# Set up an environment if there is none, then run the tests. Arguments go to pytest:
#
#   tools/test.sh                     everything but the slow tests
#   tools/test.sh -m slow             the slow ones
#   tools/test.sh tests/circuits -x   a part
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment dev
cd "$REPO"
case " $* " in *" -m "*) ;; *) set -- -m "not slow" "$@" ;; esac
echo "[test] pytest $*"
# The tests start many small processes; one math thread each is fastest on few cores.
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest "$@"
