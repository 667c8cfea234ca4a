#!/usr/bin/env bash
# From nothing to a better judge on two cores: data, a tiny model, a supervised warm-up, REAL, a report.
#
#   bash examples/quickstart/run.sh              # SEED=1 bash ... for another seed
#
# Writes runs/quickstart/seed_$SEED: report.md, learning_curve.png, real/ (the trained judge and its logs).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
seed=${SEED:-0}
out=${OUT:-runs/quickstart/seed_$seed}

bash examples/install/cpu.sh
python=${VENV:-$root/.venv}/bin/python
SECONDS=0
say() { echo "quickstart [${SECONDS} s]: $*"; }

rm -rf "$out"
mkdir -p "$out"

say "data"
"$python" examples/quickstart/task.py --output_dir "$out/data" --seed "$seed"

say "a tiny model with random weights"
"$python" examples/quickstart/make_model.py --words "$out/data/words.txt" --output_dir "$out/init" --seed "$seed"

say "supervised warm-up"
"$python" examples/quickstart/warmup.py \
  --model_name_or_path "$out/init" \
  --data "$out/data/sft.jsonl" \
  --output_dir "$out/warmup" \
  --learning_rate 3e-3 --warmup_steps 50 --lr_scheduler cosine \
  --batch_size 64 --max_steps 800 --max_len 256 \
  --seed "$seed" --log_steps 20 --device cpu

say "REAL"
"$python" -m real_openrlhf.train_real \
  --actor.model_name_or_path "$out/warmup" \
  --data.prompt_dataset "$out/data/train.jsonl" \
  --data.input_key prompt --data.label_key label --data.max_len 128 \
  --rollout.batch_size 16 --rollout.n_samples_per_prompt 8 --rollout.max_new_tokens 32 \
  --train.micro_batch_size 32 --train.max_steps 100 --train.seed "$seed" \
  --actor.adam.lr 2e-4 \
  --real.scale 1-5 --real.anchor "score " --real.keep_groups all \
  --eval.dataset "valid=$out/data/valid.jsonl,test=$out/data/test.jsonl" --eval.steps 25 \
  --ckpt.best_metric_key valid/expected/pearson \
  --ckpt.output_dir "$out/real" \
  --train.full_determinism_enable --real.device cpu

say "report"
"$python" examples/quickstart/report.py --run "$out/real" --prompts "$out/data/test.jsonl" --output_dir "$out"
say "done: $out/report.md"
