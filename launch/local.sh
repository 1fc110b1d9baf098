#!/usr/bin/env bash
# Run the whole pipeline on this machine, from nothing: environment, Ray, DeepSpeed ranks, report.
#
#   launch/local.sh                                  configs/digits.yaml
#   launch/local.sh configs/fashion_mnist.yaml       another run
#   launch/local.sh finetune.num_epochs=5            digits with a field changed
#
# Run it again to continue an interrupted run or to see that everything is done. Results go to
# runs/NAME in the folder from which you call it. DISTPC_VENV names another environment.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac

. "$(dirname "${BASH_SOURCE[0]}")/../tools/setup.sh"

CONFIG="$REPO/configs/digits.yaml"
case "${1:-}" in
*.yaml | *.yml)
    CONFIG="$1"
    [ -e "$CONFIG" ] || CONFIG="$REPO/$1"
    shift
    ;;
esac

setup_environment core
exec "$VENV/bin/distpc" run "$CONFIG" "$@"
