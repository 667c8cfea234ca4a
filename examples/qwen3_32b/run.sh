#!/usr/bin/env bash
# Qwen3-32B on two nodes of 8 GPUs with 80 GB: data, RAFT warm-up, REAL, evaluation.
#
#   bash examples/qwen3_32b/run.sh [all|data|plan|warmup|train|evaluate] [flags]
#   PLACEMENT=separate bash examples/qwen3_32b/run.sh plan
#
# PLACEMENT: colocated (the default: policy and engines take turns on all 16 GPUs) or separate. warmup and train join the
# Ray cluster that RAY_ADDRESS names; under Slurm, slurm/train_real.sbatch makes one. Other steps and settings:
# examples/recipe.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=qwen3_32b
gpus=2x8xA100-80GB
config=examples/qwen3_32b/${PLACEMENT:-colocated}.yaml
[ -f "$config" ] || { echo "PLACEMENT is colocated or separate, got '$PLACEMENT'" >&2; exit 2; }
MODEL=${MODEL:-Qwen/Qwen3-32B}
response=1024
chat=(--enable_thinking false)
source examples/recipe.sh
run_recipe "$@"
