# Sourced by launch/local.sh, tools/test.sh and tools/check.sh: sets REPO and a ready environment.
#
# The environment is $DISTPC_VENV, or .venv in the tree. It is made when absent and brought up to
# date when pyproject.toml or constraints.txt changed; otherwise nothing is installed.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DISTPC_VENV:-$REPO/.venv}"

find_python() {
    local candidate
    for candidate in "${DISTPC_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "distpc: no Python 3.11 or newer found; set DISTPC_PYTHON to one" >&2
    return 1
}

# setup_environment EXTRAS: an environment with the package (editable) and these extras. One for
# developers (dev) has what the launchers need.
setup_environment() {
    local extras="$1" python wanted stamp
    wanted="$(cat "$REPO/pyproject.toml" "$REPO/constraints.txt" | sha256sum | cut -c1-16) $REPO"
    for stamp in "$extras" dev; do
        if [ "$(cat "$VENV/.distpc-$stamp" 2>/dev/null)" = "$wanted" ]; then
            echo "[setup] environment $VENV is ready"
            return
        fi
    done
    python="$(find_python)" || return 1
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        echo "[setup] making a virtual environment in $VENV with $python"
        "$python" -m venv --clear "$VENV" || {
            echo "distpc: cannot make $VENV; set DISTPC_VENV to a folder you can write" >&2
            return 1
        }
    fi
    echo "[setup] installing distpc[$extras] with the versions of constraints.txt (minutes)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$REPO/constraints.txt" --editable "$REPO[$extras]" || return 1
    echo "$wanted" >"$VENV/.distpc-$extras"
    echo "[setup] done"
}
