#!/usr/bin/env bash
# Set up an environment if there is none, then run the tests. Arguments go to pytest:
#
#   tools/test.sh                     everything but the slow tests
#   tools/test.sh -m slow             the slow ones
#   tools/test.sh tests/circuits -x   a part
#   tools/test.sh -n 0 ...            in one process (default: two, a file of tests in either)
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment dev
cd "$REPO"
case " $* " in *" -m "*) ;; *) set -- -m "not slow" "$@" ;; esac
case " $* " in *" -n "*) ;; *) set -- -n 2 --dist loadfile "$@" ;; esac
echo "[test] pytest $*"
# The tests start many small processes; one math thread each is fastest on few cores.
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest "$@"
