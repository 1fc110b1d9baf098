#!/usr/bin/env bash
# Several hosts for real, on this machine: network namespaces on one switch, each with an address,
# a Ray node and a torchrun agent of its own. Shared storage is this machine's disk.
#
#   tools/hosts.sh              two hosts, then three; some fifteen minutes on two cores
#   tools/hosts.sh --only NAME  one scenario and the undisturbed run that it is compared with
#                               (may be repeated): traffic ray-2 ray-2-cut ray-3-cut ray-2-lost
#                               torchrun-2 torchrun-2-cut torchrun-3-cut torchrun-elastic
#   tools/hosts.sh --quick RUN  two hosts train, one is cut off; compared with the finished run RUN
#
# With --runs FOLDER the run folders stay there, and a later call takes undisturbed runs from them.
#
# Checked: bytes a training step sends, by the interfaces' counters, against the planner's; a whole
# run on a Ray cluster over the hosts; a host cut off during extraction, which the others finish,
# and one switched off during training on Ray; training by launch/torchrun.sh over the hosts with
# ZeRO-3; a host cut off then, which ends all ranks in bounded time with an error that names the
# lost rank, and the same result when the others resume; torchrun's elastic restart without it.
#
# Exit status: 0 all held, 1 something did not, 77 no namespaces are permitted here. All processes,
# interfaces and files of it are gone when it ends, however it ends.
set -euo pipefail

case "${1:-}" in
-h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment core
DISTPC_VENV="$VENV" exec "$VENV/bin/python" "$REPO/tools/hosts" "$@"
