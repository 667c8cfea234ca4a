#!/usr/bin/env bash
# Runs checks that need a GPU: one script per question, each within 3 minutes; see tests/gpu/README.md.
#
#   bash tests/gpu.sh                     # all checks, those without vLLM first
#   bash tests/gpu.sh attention packed    # some of them
#
# PYTHON=... chooses the interpreter (default .venv/bin/python, else python3). Verdicts go to $OUT (default runs/gpu) as
# one JSON file per check. Without a GPU every check is skipped and the exit code is 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
export OUT=${OUT:-runs/gpu} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
limit=${LIMIT:-180}

policy="attention head packed step update sync"
engine="engine run resume smollm2"
checks=("$@")
[ ${#checks[@]} -gt 0 ] || read -ra checks <<<"$policy $engine"

lines=() worst=0
for check in "${checks[@]}"; do
  [ -f "tests/gpu/$check.py" ] || { echo "no check '$check'; there are: $policy $engine" >&2; exit 2; }
  timeout --kill-after=10 "$limit" "$python" -m "tests.gpu.$check"
  code=$?
  case $code in
    0) lines+=("$check: ok or skipped, see above") ;;
    1) lines+=("$check: NO"); worst=1 ;;
    124 | 137) lines+=("$check: not done within $limit s"); worst=1 ;;
    *) lines+=("$check: ended with exit code $code"); worst=1 ;;
  esac
done
echo "== verdicts"
printf '%s\n' "${lines[@]}"
exit $worst
