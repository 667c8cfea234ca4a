#!/usr/bin/env bash
# Qwen3-1.7B with LoRA on one GPU with 24 GB: data, warm-up, REAL, evaluation.
#
#   bash examples/one_24gb_gpu/run.sh [all|data|plan|warmup|train|evaluate] [flags]
#
# Steps and settings: examples/recipe.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=one_24gb_gpu
gpus=1xL4-24GB
config=examples/one_24gb_gpu/config.yaml
MODEL=${MODEL:-Qwen/Qwen3-1.7B}
response=512
chat=(--enable_thinking false)
source examples/recipe.sh
run_recipe "$@"
