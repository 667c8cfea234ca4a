#!/usr/bin/env bash
# Qwen3-4B, all parameters, on one GPU with 80 GB: data, warm-up, REAL, evaluation.
#
#   bash examples/one_80gb_gpu/run.sh [all|data|plan|warmup|train|evaluate] [flags]
#
# Steps and settings: examples/recipe.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=one_80gb_gpu
gpus=1xA100-80GB
config=examples/one_80gb_gpu/config.yaml
MODEL=${MODEL:-Qwen/Qwen3-4B}
response=1024
chat=(--enable_thinking false)
source examples/recipe.sh
run_recipe "$@"
