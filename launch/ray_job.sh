#!/usr/bin/env bash
# The whole pipeline as one job on a running Ray cluster; training on a placement group in it.
#
#   RAY_AUTH_MODE=token ray start --head        once; first `ray get-auth-token --generate`
#   launch/ray_job.sh configs/digits.yaml --out /shared/runs/digits
#
# This source tree goes to the cluster as the job's working directory; its Python needs distpc's
# dependencies (`pip install 'distpc[jobs]'` there too). CONFIG lies in this tree or, like --out
# (default: runs/NAME below the folder from which you call), where all machines see it.
# The job outlives this command: `ray job stop ID` ends it, the same command continues it.
#
# RAY_API_SERVER_ADDRESS  of the cluster (http://127.0.0.1:8265)
# RAY_AUTH_MODE           token (default) or disabled, as the cluster was started; the token comes
#                         from RAY_AUTH_TOKEN or ~/.ray/auth_token
# JOB_PYTHON              Python of the cluster (python)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_arguments "$@"
setup_environment jobs

export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" RAY_USAGE_STATS_ENABLED=0
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s ~/.ray/auth_token ]; then
    echo "ray_job.sh: no token in RAY_AUTH_TOKEN or ~/.ray/auth_token: take the one that the" \
        "cluster was started with, or set RAY_AUTH_MODE=disabled if it has none" >&2
    exit 2
fi
ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
PLACE="${ADDRESS#*://}" PLACE="${PLACE%%/*}"
if ! (exec 3<>"/dev/tcp/${PLACE%%:*}/${PLACE##*:}") 2>/dev/null; then
    echo "ray_job.sh: no Ray cluster answers at $ADDRESS: start one (see the top of this script)," \
        "or set RAY_API_SERVER_ADDRESS to its http://HOST:PORT" >&2
    exit 2
fi
case " ${ARGS[*]:-} " in
*" --out"*) ;;
*) ARGS+=(--out "$PWD/runs/$(sed -n 's/^name: *//p' "$CONFIG")") ;;
esac
excludes='[".git", ".venv", "runs", "data", "*.pyc", "docs/*.png"]'
id="distpc-$(date +%s)-$$"
# Those of a cluster's processes that take jobs begin some seconds after it answers.
for attempt in $(seq 30); do
    answer=$("$VENV/bin/ray" job submit --no-wait --submission-id "$id" --address "$ADDRESS" \
        --runtime-env-json "{\"working_dir\": \"$REPO\", \"excludes\": $excludes}" \
        -- "${JOB_PYTHON:-python}" -m distpc run "${CONFIG#"$REPO/"}" "${ARGS[@]}" 2>&1) && break
    [[ "$answer" == *"No available agent"* && "$attempt" != 30 ]] || { echo "$answer" >&2; exit 1; }
    sleep 2
done
"$VENV/bin/ray" job logs --follow --address "$ADDRESS" "$id"
status=$("$VENV/bin/ray" job status --address "$ADDRESS" "$id" 2>&1)
[[ "$status" == *succeeded* ]] || { echo "$status" >&2; exit 1; }
