#!/usr/bin/env bash
# The judging task from nothing: data, a tiny model, its warm-up, REAL, and agreement with the labels on every test set.
#
#   bash examples/judging_task/run.sh              # SEED=1 bash ... for another seed
#
# Writes runs/judging_task/seed_$SEED: start (warmed up), real (the trained judge), start.json and real.json.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
seed=${SEED:-0}
out=${OUT:-runs/judging_task/seed_$seed}

bash examples/install/cpu.sh
python=${VENV:-$root/.venv}/bin/python
SECONDS=0
say() { echo "judging task [${SECONDS} s]: $*"; }

say "data, a tiny model, and two stages of warm-up (what is there is kept)"
"$python" -m examples.judging_task.warm_up --output_dir "$out" --seed "$seed"

say "REAL"
rm -rf "$out/real"
"$python" -m real_openrlhf.train_real --config examples/judging_task/config.yaml \
  --actor.model_name_or_path "$out/start" \
  --data.prompt_dataset "$out/data/train.jsonl" \
  --eval.dataset "valid=$out/data/valid.jsonl" \
  --train.seed "$seed" --ckpt.output_dir "$out/real"

for model in start real/model; do
  say "agreement of $model with the labels"
  "$python" -m examples.judging_task.measure --model "$out/$model" --data "$out/data" --output "$out/${model%/model}.json"
done
say "done: $out/real.json"
