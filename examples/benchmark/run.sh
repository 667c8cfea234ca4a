#!/usr/bin/env bash
# A training step of this project against OpenRLHF's own and the authors' passes, on the same weights and rollouts.
#
#   bash examples/benchmark/run.sh            # at most an hour on two cores, install apart
#   bash examples/benchmark/run.sh --small    # a tiny model, about a minute
#
# Further words go to examples.benchmark.run (--minutes, --seed, --logits_mb, --device, ...). INSTALL=none takes the
# python on the PATH (or PYTHON=...). Writes runs/benchmark/results (OUT=...): benchmark.json, benchmark.md, plots.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
cache=${CACHE_DIR:-.cache/stsb}
work=${WORK:-runs/benchmark}

if [ "${INSTALL:-cpu}" = none ]; then
  python=${PYTHON:-python}
else
  bash examples/install/cpu.sh
  python=${VENV:-$root/.venv}/bin/python
fi

large=()
if [[ " $* " != *" --small "* ]]; then
  "$python" examples/stsb/get_model.py --output_dir "$cache/model" --cache_dir "$cache"
  large=(--large "$cache/model")
fi

"$python" -m examples.benchmark.run "${large[@]}" --work_dir "$work" --output_dir "${OUT:-$work/results}" "$@"
