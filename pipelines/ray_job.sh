#!/usr/bin/env bash
# Run an extraction as a job on a Ray cluster, and wait for it: the exit code is the job's.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 pipelines/ray_job.sh SRC... -o OUT [options]
#
# resfeat is installed on every machine of the cluster, and all of them see SRC and OUT under the
# same paths. Where the cluster asks for a token, also set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
# Whoever reaches the job port can run any code: keep it on a private network.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi

exec ray job submit \
    --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
    -- resfeat extract "$@" --address auto
