#!/usr/bin/env bash
# From a CSV of question, answer and score to a trained judge that is served.
#
#   bash examples/own_data/run.sh                                   # STS-B from the hub, a tiny model made here
#   DATA_DIR=/where/stsb/is bash examples/own_data/run.sh           # STS-B from the disk
#   CSV=mine.csv NEW=new.csv SCALE=1-5 MODEL=/models/base LR=1e-6 WARMUP_LR=1e-5 bash examples/own_data/run.sh
#
# A part whose result is there already is not done again: the same command goes on where it ended.
# STEPS, EPOCHS, SEED and DEVICE change the run; INSTALL=none takes the python on the PATH (or PYTHON=...).
# Writes runs/own_data/seed_$SEED: real/model (the judge), scores.jsonl, results.json.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
seed=${SEED:-0}
device=${DEVICE:-cpu}
scale=${SCALE:-0-5}
out=${OUT:-runs/own_data/seed_$seed}
csv=${CSV:-$out/judgments.csv}
new=${NEW:-$out/new.csv}
model=${MODEL:-$out/base}

if [ "${INSTALL:-cpu}" = none ]; then
  python=${PYTHON:-python}
else
  bash examples/install/cpu.sh
  python=${VENV:-$root/.venv}/bin/python
fi

mkdir -p "$out"
# part RESULT WHAT COMMAND...: unless RESULT is there
part() {
  local result=$1 what=$2 begin=$SECONDS; shift 2
  if [ -e "$result" ]; then echo "own data: $what: there already"; return; fi
  echo "own data [${SECONDS} s]: $what"
  "$@"
  printf '%s\t%s\n' "$what" "$((SECONDS - begin))" >>"$out/wall.tsv"
}
common=(--config examples/own_data/config.yaml --real.scale "$scale" --real.device "$device" --train.seed "$seed")
common+=(--eval.dataset "$out/data/dev.parquet")

[ -n "${CSV:-}" ] || part "$csv" "CSV" "$python" -m examples.own_data.make_csv --output_dir "$out" ${DATA_DIR:+--data_dir "$DATA_DIR"}

part "$out/data/manifest.json" "data" "$python" -m real_openrlhf.data generic --source "$csv" \
  --map instruction=question response=answer label=score --scale "$scale" --template answer \
  --split train=0.75,dev=0.1,test=0.15 --seed "$seed" --sft --output_dir "$out/data"

[ -n "${MODEL:-}" ] || part "$out/base/config.json" "a tiny model" "$python" -m examples.own_data.make_model \
  --data "$out/data/train.parquet" --output_dir "$out/base" --seed "$seed" --device "$device"

part "$out/warmup/model" "feedback and warm-up" "$python" -m real_openrlhf.train_warmup "${common[@]}" \
  --actor.model_name_or_path "$model" --data.prompt_dataset "$out/data/sft.parquet" --warmup.feedback missing \
  --actor.adam.lr "${WARMUP_LR:-1e-3}" --train.num_episodes "${EPOCHS:-12}" --eval.steps 60 --ckpt.load auto \
  --ckpt.output_dir "$out/warmup"

part "$out/real/model" "REAL" "$python" -m real_openrlhf.train_real "${common[@]}" \
  --actor.model_name_or_path "$out/warmup/model" --data.prompt_dataset "$out/data/train.parquet" \
  --rollout.batch_size 16 --rollout.n_samples_per_prompt 8 --train.micro_batch_size 32 \
  --actor.adam.lr "${LR:-2e-4}" --train.max_steps "${STEPS:-40}" --eval.steps 20 --ckpt.load auto \
  --ckpt.output_dir "$out/real"

for judge in warmup real; do
  part "$out/eval/$judge/results.json" "evaluation of $judge" "$python" -m real_openrlhf.evaluate \
    --model "$out/$judge/model" --method "$judge" --benchmark "test=$out/data/test.parquet" \
    --device "$device" --backend auto --output_dir "$out/eval/$judge"
done
part "$out/eval/comparison.json" "comparison" "$python" -m real_openrlhf.evaluate \
  --compare "$out/eval/warmup" "$out/eval/real" --output_dir "$out/eval"

part "$out/scores.jsonl" "scores of new answers" "$python" -m real_openrlhf.judge --model "$out/real/model" \
  --input "$new" --instruction_key question --response_key answer --device "$device" --output "$out/scores.jsonl"
part "$out/served.jsonl" "the same from a server" "$python" -m examples.own_data.ask_server --model "$out/real/model" \
  --input "$new" --device "$device" --output "$out/served.jsonl"

"$python" -m examples.own_data.report --run "$out"
