#!/usr/bin/env bash
# REAL on real human labels with a real small model: SmolLM2-135M-Instruct learns to judge STS-B.
#
#   bash examples/stsb/run.sh                    # data from the hub
#   DATA_DIR=/where bash examples/stsb/run.sh    # stsb_{train,dev,test}.jsonl from a folder
#
# WARMUP_STEPS, STEPS, PROMPTS, SAMPLES, LR, BETA, KEEP, SEED and EVAL_SAMPLES (0: the whole test split) change the run.
# INSTALL=none takes the python on the PATH (or PYTHON=...) and DEVICE=cuda trains on GPUs.
# Writes runs/stsb/seed_$SEED: report.md, warmup/ and real/ (the trained judges and their logs).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
seed=${SEED:-0}
device=${DEVICE:-cpu}
out=${OUT:-runs/stsb/seed_$seed}
cache=${CACHE_DIR:-.cache/stsb}

if [ "${INSTALL:-cpu}" = none ]; then
  python=${PYTHON:-python}
else
  bash examples/install/cpu.sh
  python=${VENV:-$root/.venv}/bin/python
fi

mkdir -p "$out" "$cache"
rm -rf "$out/data" "$out/start" "$out/warmup" "$out/real" "$out/report.md"
: >"$out/wall.tsv"
part() {
  local what=$1 begin=$SECONDS; shift
  echo "stsb [${SECONDS} s]: $what"
  "$@"
  printf '%s\t%s\n' "$what" "$((SECONDS - begin))" >>"$out/wall.tsv"
}

# What every evaluation and REAL share: the same prompts, lengths and scale.
common=(
  --config examples/stsb/config.yaml
  --data.prompt_dataset "$out/data/train.jsonl"
  --rollout.batch_size "${PROMPTS:-16}" --rollout.n_samples_per_prompt "${SAMPLES:-8}"
  --train.micro_batch_size 8 --train.seed "$seed"
  --real.preset paper
  --eval.dataset "$out/data/test.jsonl"
  --real.device "$device"
)
[ "${EVAL_SAMPLES:-0}" = 0 ] || common+=(--eval.max_samples "$EVAL_SAMPLES")

part "model" "$python" examples/stsb/get_model.py --output_dir "$cache/model" --cache_dir "$cache"
part "data" "$python" examples/stsb/prepare.py --output_dir "$out/data" --seed "$seed" ${DATA_DIR:+--data_dir "$DATA_DIR"}

part "evaluation of the start model" "$python" -m real_openrlhf.train_real "${common[@]}" \
  --actor.model_name_or_path "$cache/model" --train.max_steps 0 --ckpt.output_dir "$out/start"

part "warm-up" "$python" -m real_openrlhf.train_warmup --config examples/stsb/config.yaml \
  --actor.model_name_or_path "$cache/model" --data.prompt_dataset "$out/data/sft.jsonl" --ckpt.output_dir "$out/warmup" \
  --train.seed "$seed" --real.device "$device" \
  --actor.adam.lr 2e-4 --train.batch_size 8 --train.max_steps "${WARMUP_STEPS:-100}" --train.num_episodes 100 --logger.logging_steps 2

part "REAL, evaluations included" "$python" -m real_openrlhf.train_real "${common[@]}" \
  --actor.model_name_or_path "$out/warmup/model" --actor.adam.lr "${LR:-1e-5}" \
  --train.max_steps "${STEPS:-15}" --real.beta "${BETA:-0.01}" --real.keep_groups "${KEEP:-partial}" \
  --eval.steps -1 --ckpt.output_dir "$out/real"

"$python" examples/stsb/report.py --start "$out/start" --real "$out/real" --wall "$out/wall.tsv" --output_dir "$out"
echo "stsb: $out/report.md"
