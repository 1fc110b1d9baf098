#!/usr/bin/env bash
# The whole pipeline as ranks of torchrun, on 1 .. N machines, with elastic restart.
#
#   launch/torchrun.sh configs/digits.yaml                           this machine alone
#   NNODES=2 RDZV=10.0.0.1:29400 launch/torchrun.sh CONFIG --out /shared/runs/x
#                                                     the same on each of two machines
#   NNODES=2:8 ...                                    starts with 2, takes up to 8 as they come
#
# NPROC         ranks on this machine (its GPUs, or 2)
# NNODES        machines, N or MIN:MAX (1)
# RDZV          host:port of the first machine; needed with several
# RDZV_ID       name of the run, if one machine serves several (distpc)
# LOCAL_ADDR    address of this machine for the others, where its host name does not resolve
# MAX_RESTARTS  times that all ranks start again after one is lost (3); each continues the run
# JOIN_SECONDS  how long a machine waits for the others, at first and after a loss (600)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_arguments "$@"
setup_environment core
count_ranks

NNODES="${NNODES:-1}"
options=(--nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-3}")
if [ "$NNODES" = 1 ]; then
    options+=(--standalone --local-addr "${LOCAL_ADDR:-127.0.0.1}")
else
    : "${RDZV:?set RDZV to host:port of the first machine}"
    options+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV")
    options+=(--rdzv-id "${RDZV_ID:-distpc}")
    rdzv="join_timeout=${JOIN_SECONDS:=600}"
    echo "[torchrun] waits up to $JOIN_SECONDS s (JOIN_SECONDS) for $NNODES machines at $RDZV" >&2
    if [ -n "${LOCAL_ADDR:-}" ]; then
        # Whether the meeting point is here: torchrun itself would look its host name up.
        options+=(--local-addr "$LOCAL_ADDR")
        rdzv+=",is_host=$([ "$LOCAL_ADDR" = "${RDZV%:*}" ] && echo 1 || echo 0)"
    fi
    options+=(--rdzv-conf "$rdzv")
fi
# Rank 0 runs the other stages with all cores; in training each rank takes its own few.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
exec "$VENV/bin/python" -m torch.distributed.run "${options[@]}" -m distpc run "$CONFIG" "${ARGS[@]}"
