#!/usr/bin/env bash
# The second synthetic task: two presets, two seeds, a run each, from the data on. Writes runs/repeat/facts.
#
#   bash examples/facts/run.sh                 # further flags go to examples/quickstart/repeat.py
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
bash examples/install/cpu.sh
python=${VENV:-$root/.venv}/bin/python
"$python" examples/quickstart/repeat.py --task facts --steps 50 --cells exact paper --seeds 0 1 --repeats 1 "$@"
