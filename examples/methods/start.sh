#!/usr/bin/env bash
# An example's environment, its model and its cells, for the run.sh of stsb and mtbench.
#
#   bash examples/methods/start.sh stsb [words for examples.methods.run]
#
# SIZE, DATA_DIR, CACHE_DIR; INSTALL=none takes the python on the PATH (or PYTHON=...), else VENV or .venv.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
example=${1:?give the example: stsb or mtbench}; shift
cache=${CACHE_DIR:-.cache/stsb}

if [ "${INSTALL:-cpu}" = none ]; then
  python=${PYTHON:-python}
else
  bash examples/install/cpu.sh
  python=${VENV:-$root/.venv}/bin/python
fi

"$python" -m examples.stsb.get_model --output_dir "$cache/model" --cache_dir "$cache"
"$python" -m examples.methods.run "$example" --size "${SIZE:-cpu}" --model "$cache/model" \
  ${DATA_DIR:+--data_dir "$DATA_DIR"} "$@"
