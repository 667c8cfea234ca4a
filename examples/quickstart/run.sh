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
"$python" -m real_openrlhf.train_real --config examples/quickstart/config.yaml \
  --actor.model_name_or_path "$out/warmup" \
  --data.prompt_dataset "$out/data/train.jsonl" \
  --eval.dataset "valid=$out/data/valid.jsonl,test=$out/data/test.jsonl" \
  --train.seed "$seed" --ckpt.output_dir "$out/real"

say "report"
"$python" examples/quickstart/report.py --run "$out/real" --prompts "$out/data/test.jsonl" --output_dir "$out"
say "done: $out/report.md"
