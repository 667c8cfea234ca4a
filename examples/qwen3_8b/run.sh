#!/usr/bin/env bash
# Qwen3-8B on 8 GPUs with 80 GB: data, RAFT warm-up, REAL, evaluation.
#
#   bash examples/qwen3_8b/run.sh [all|data|plan|warmup|train|evaluate] [flags]
#
# Steps and settings: examples/recipe.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=qwen3_8b
gpus=8xA100-80GB
config=examples/qwen3_8b/config.yaml
MODEL=${MODEL:-Qwen/Qwen3-8B}
response=1024
chat=(--enable_thinking false)
source examples/recipe.sh
run_recipe "$@"
