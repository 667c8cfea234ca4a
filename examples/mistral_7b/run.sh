#!/usr/bin/env bash
# Mistral-7B-v0.2 on 8 GPUs with 80 GB: data, TRACT warm-up, REAL, evaluation.
#
#   bash examples/mistral_7b/run.sh [all|data|plan|warmup|train|evaluate] [flags]
#
# Steps and settings: examples/recipe.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=mistral_7b
gpus=8xA100-80GB
config=examples/mistral_7b/config.yaml
MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.2}
response=1024
chat=()
source examples/recipe.sh
run_recipe "$@"
