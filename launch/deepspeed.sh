#!/usr/bin/env bash
# The whole pipeline as ranks of DeepSpeed's launcher, on this machine or those of a hostfile.
#
#   launch/deepspeed.sh configs/digits.yaml                           this machine alone
#   HOSTFILE=hosts launch/deepspeed.sh CONFIG --out /shared/runs/x    all machines, by pdsh and ssh
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/deepspeed.sh CONFIG --out ...
#                                                     without ssh: on each machine, 0, 1, ...
#
# HOSTFILE     lines such as `10.0.0.1 slots=8`; slots are ranks
# NODE_RANK    number of this machine in the hostfile, where there is no ssh
# NPROC        ranks on this machine when there is no hostfile (its GPUs, or 2)
# MASTER_ADDR  address of the first machine; needed with NODE_RANK
# MASTER_PORT  a port that is free there (29500)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_arguments "$@"
setup_environment core
count_ranks

options=(--no_local_rank --master_port "${MASTER_PORT:-29500}")
if [ -z "${HOSTFILE:-}" ]; then
    options+=(--num_gpus "$NPROC" --master_addr "${MASTER_ADDR:-127.0.0.1}")
else
    options+=(--hostfile "$HOSTFILE")
    [ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
    if [ -n "${NODE_RANK:-}" ]; then
        : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"
        options+=(--no_ssh --node_rank "$NODE_RANK")
    fi
fi
# Its launchers on the machines are started with the Python that is first on the PATH.
export PATH="$VENV/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
exec "$VENV/bin/deepspeed" "${options[@]}" --module distpc run "$CONFIG" "${ARGS[@]}"
