#!/usr/bin/env bash
# The paper's tables on the judging task: every cell, the tables and Figure 2.
#
#   bash examples/paper_tables/run.sh                      # flags of examples.paper_tables.run may follow
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
bash examples/install/cpu.sh
python=${VENV:-$root/.venv}/bin/python
"$python" -m examples.paper_tables.run "$@"
