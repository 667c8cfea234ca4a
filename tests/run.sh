#!/usr/bin/env bash
# Sets up the CPU stack if needed, then checks style, shell scripts and types and runs the tests.
#
#   bash tests/run.sh                 # unit tests and the integration tests of a few minutes
#   bash tests/run.sh --slow          # the slow ones as well, but for the next lines'
#   bash tests/run.sh --slurm         # only those that need a Slurm, which root on Debian gets installed
#   bash tests/run.sh --faults        # only those in which processes are killed while runs go on
#   bash tests/run.sh tests/unit -k loss   # anything else goes to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/install/cpu.sh
bin=.venv/bin
# Tests use small tensors, for which several threads are slower. Actors set their own number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0

select=(-m "not slow and not slurm and not faults")
case ${1:-} in
  --slow) select=(-m "not slurm and not faults"); shift ;;
  --slurm) select=(tests/slurm); export INSTALL_SLURM=1; shift ;;
  --faults) select=(-m faults); shift ;;
esac

echo "== ruff"
"$bin/ruff" check .
"$bin/ruff" format --check .
echo "== shellcheck"
find slurm examples tests \( -name "*.sh" -o -name "*.sbatch" \) -exec "$bin/shellcheck" --external-sources {} +
echo "== mypy"; "$bin/mypy" --no-error-summary
echo "== pytest"; "$bin/python" -m pytest -q --durations=8 "${select[@]}" "$@"
