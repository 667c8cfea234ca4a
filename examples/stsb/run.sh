#!/usr/bin/env bash
# The methods on STS-B: SmolLM2-135M-Instruct, RAFT until validation stops improving, then standard RL, Term 2 only, REAL.
#
#   DATA_DIR=/where bash examples/stsb/run.sh              # stsb_{train,dev,test}.jsonl from a folder
#   bash examples/stsb/run.sh                              # data from the hub
#   SIZE=gpu INSTALL=none PYTHON=python bash examples/stsb/run.sh
#
# SIZE: cpu (two cores, one seed), gpu (three seeds), tiny. What is done is not done again: the same command goes on.
# Further words go to examples.methods.run (--list, --output_dir, --results, --device).
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/../methods/start.sh" stsb "$@"
