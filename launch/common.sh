# Sourced by the launchers: the environment, CONFIG (default: digits), ARGS (the rest), NPROC.

. "$(dirname "${BASH_SOURCE[0]}")/../tools/setup.sh"

usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

take_arguments() {
    case "${1:-}" in -h | --help) usage; exit 0 ;; esac
    CONFIG="$REPO/configs/digits.yaml"
    case "${1:-}" in
    *.yaml | *.yml)
        CONFIG="$1"
        [ -e "$CONFIG" ] || CONFIG="$REPO/$1"
        shift
        ;;
    esac
    CONFIG="$(realpath "$CONFIG")"
    ARGS=("$@")
}

# One rank a GPU of this machine; two where there is none.
count_ranks() {
    local gpus
    gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
    [ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
    NPROC="${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}"
}
