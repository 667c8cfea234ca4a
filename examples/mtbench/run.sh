#!/usr/bin/env bash
# The methods on GPT-4's judgements of MT-Bench answers: SmolLM2-135M-Instruct, RAFT until validation stops improving,
# then standard RL, Term 2 only, REAL. Tested on held-out questions and on Vicuna Bench.
#
#   DATA_DIR=/where bash examples/mtbench/run.sh           # mtbench_judgments.jsonl(.gz), perhaps vicuna_eval.json
#   SIZE=gpu INSTALL=none PYTHON=python DATA_DIR=/where bash examples/mtbench/run.sh
#
# SIZE: cpu (two cores, one seed, short rows), gpu (three seeds), tiny. What is done is not done again: the same command
# goes on. Further words go to examples.methods.run (--list, --output_dir, --results, --device).
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/../methods/start.sh" mtbench "$@"
