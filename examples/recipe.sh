# shellcheck shell=bash disable=SC2153,SC2154  # each run.sh assigns name, gpus, config, MODEL, response and chat
# What the run.sh of mistral_7b, qwen3_8b, qwen3_32b, one_24gb_gpu and one_80gb_gpu have in common; they source it.
#
#   bash examples/NAME/run.sh [all|data|plan|warmup|train|evaluate] [further flags of the step's command]
#
#   data      judgements and benchmarks to parquet files, in $DATA
#   plan      no training: checks everything and prints placement, memory and time, for GPUs that need not be here
#   warmup    supervised start on the judgements, in $OUT/warmup
#   train     REAL from $START, in $OUT/real
#   evaluate  start and trained judge on all benchmarks, and the comparison, in $OUT/eval
#   all       data, warmup, train, evaluate (the default)
#
# Settings from the environment:
#   MODEL      hub id or folder of the model that the warm-up begins with
#   START      what REAL begins with; by default the warm-up's judge
#   DATA       folder of the data sets (default data/judge)
#   REAL_DATA  the authors' data, as `hf download yasiz/real_data --repo-type dataset --local-dir ...` leaves it
#              (default data/real_data): three of the benchmarks
#   OUT        folder of the runs (default runs/NAME)
#   GPUS       for plan: other GPUs, such as 4xH100-80GB
#   SERVER     for evaluate: address of a server of the judge, instead of an engine on one GPU
#   PYTHON     the interpreter (default: .venv, which examples/install/gpu.sh makes)

# Each run.sh says before: name, gpus (as --assume_gpus takes them), config, MODEL, response (longest, in tokens), and
# chat, the flags of evaluate about the chat template.

fail() { echo "$name: $*" >&2; exit 2; }

python=${PYTHON:-${VENV:-$PWD/.venv}/bin/python}
data=${DATA:-data/judge}
real_data=${REAL_DATA:-data/real_data}/real_dataset
out=${OUT:-runs/$name}
start=${START:-$out/warmup/model}
benchmarks=(
  "feedback_bench=$data/feedback_bench/test.parquet" "flask=$data/flask/test.parquet"
  "vicuna_bench=$data/vicuna_bench/test.parquet" "mt_bench=$data/mt_bench/test.parquet"
)
train_data=(
  --data.prompt_dataset "$data/feedback_collection/train.parquet"
  --eval.dataset "$(IFS=,; echo "${benchmarks[*]}")" --ckpt.output_dir "$out/real"
)

# What is there is kept.
build() {
  local builder=$1 folder=$data/$2; shift 2
  if [ -f "$folder/manifest.json" ]; then echo "$name: $folder is there"; return; fi
  "$python" -m real_openrlhf.data "$builder" --output_dir "$folder" "$@"
}

make_data() {
  build feedback_collection feedback_collection --sft "$@"
  build feedback_bench feedback_bench
  build real_parquet flask --source "test=$real_data/flask/test.parquet"
  build real_parquet vicuna_bench --source "test=$real_data/vicuna/test.parquet"
  build real_parquet mt_bench --source "test=$real_data/mt_bench/test.parquet"
}

# The model's own config and tokenizer will do: the start has the same.
make_plan() {
  "$python" -m real_openrlhf.train_real --config "$config" --dry_run --assume_gpus "${GPUS:-$gpus}" \
    --actor.model_name_or_path "$MODEL" "${train_data[@]}" "$@"
}

make_start() {
  "$python" -m real_openrlhf.train_warmup --config "examples/$name/warmup.yaml" \
    --actor.model_name_or_path "$MODEL" --data.prompt_dataset "$data/feedback_collection/sft.parquet" \
    --ckpt.output_dir "$out/warmup" "$@"
}

train() {
  "$python" -m real_openrlhf.train_real --config "$config" --actor.model_name_or_path "$start" "${train_data[@]}" "$@"
}

# Sampled at temperature 1, as in the paper (Table 9).
judge() {
  local model=$1 folder=$2 training=$3 plain=(); shift 3
  # A model that no run here exported does not say how it scores.
  if [ -n "${START:-}" ] && [ "$model" = "$START" ] && [ ! -f "$model/real_openrlhf.json" ]; then
    plain=(--scale 1-5 --max_new_tokens "$response" "${chat[@]}")
  fi
  "$python" -m real_openrlhf.evaluate --model "$model" --output_dir "$folder" --training "$training" \
    --benchmark "${benchmarks[@]}" --temperature 1 "${plain[@]}" ${SERVER:+--server "$SERVER"} "$@"
}

evaluate() {
  # A server holds one judge: its runs are compared by hand.
  if [ -n "${SERVER:-}" ]; then judge "$out/real/model" "$out/eval/real" RL "$@"; return; fi
  judge "$start" "$out/eval/start" SFT "$@"
  judge "$out/real/model" "$out/eval/real" RL "$@"
  "$python" -m real_openrlhf.evaluate --compare "$out/eval/start" "$out/eval/real" --output_dir "$out/eval/comparison"
}

run_recipe() {
  local step=${1:-all}
  [ $# = 0 ] || shift
  case $step in
    data) make_data "$@" ;;
    plan) make_plan "$@" ;;
    warmup) make_start "$@" ;;
    train) train "$@" ;;
    evaluate) evaluate "$@" ;;
    all)
      [ $# = 0 ] || fail "flags belong to one step; name it: data, plan, warmup, train or evaluate"
      make_data
      # A start that is given, or done, needs no warm-up.
      [ -n "${START:-}" ] || [ -f "$start/real_openrlhf.json" ] || make_start
      train
      evaluate
      ;;
    *) fail "there is no step '$step'; there are data, plan, warmup, train, evaluate and all" ;;
  esac
}
