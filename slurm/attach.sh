#!/usr/bin/env bash
# A shell, or one command, inside a running job: on its head node, where `ray status` finds the job's cluster.
#
#   bash slurm/attach.sh JOB
#   bash slurm/attach.sh JOB ray status
#
# RAY_TMP as it was for the job.
set -euo pipefail

fail() { echo "attach: $*" >&2; exit 1; }
job=${1:?usage: attach.sh JOB [COMMAND ...]}
shift
list=$(squeue --noheader --states=running --jobs="$job" --format=%N 2>/dev/null || true)
[ -n "$list" ] || fail "job $job is not running"
head_node=$(scontrol show hostnames "$list" | head -n 1)

read -r -d '' inside <<'INSIDE' || true
[ -r "$0" ] || { echo "attach: no cluster in $0 (yet?); is RAY_TMP that of the job?" >&2; exit 1; }
. "$0"
read -ra container <<<"${CONTAINER:-}"
exec "${container[@]}" "$@"
INSIDE

terminal=()
if [ "$#" = 0 ]; then
  terminal=(--pty)
  set -- bash -i
fi
exec srun --jobid="$job" --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" "${terminal[@]}" \
  bash -c "$inside" "${RAY_TMP:-/tmp}/real_$job.0/session" "$@"
