#!/usr/bin/env bash
# Run an extraction as a job on a Ray cluster, and wait for it: the exit code is the job's, 143 if it
# was stopped.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 pipelines/ray_job.sh SRC... -o OUT [options]
#
# All machines of the cluster see SRC and OUT under the same paths, and have resfeat. With
# SEND_CODE=1 it is enough that they have what it depends on: its code travels with the job.
# JOB_ID=night-1 names the job: `ray job logs night-1 --follow` shows it, and `ray job stop night-1`
# stops it, with time for the shards in hand. The same again, with another JOB_ID, resumes.
# Where the cluster asks for a token, also set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
# Whoever reaches the job port can run any code: keep it on a private network.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
fi

# Ray would kill a job 3 s after it was told to stop, and resfeat takes up to 20 s to finish shards.
environment='{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}'
if [ -n "${SEND_CODE:-}" ]; then
    code=$(cd "$(dirname "$0")/../resfeat" && pwd)
    environment+=", \"py_modules\": [\"$code\"]"
fi
environment+='}'

job=${JOB_ID:-resfeat-$(date +%Y%m%dT%H%M%S)-$$}
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

# Without -P, Python would import what lies in the folder that the job is started in.
ray job submit \
    --runtime-env-json "$environment" \
    --submission-id "$job" \
    -- python -P -m resfeat extract "$@" --address auto

# For Ray a job that was stopped has not failed.
if ray job status "$job" | grep "was stopped" >/dev/null; then
    exit 143
fi
