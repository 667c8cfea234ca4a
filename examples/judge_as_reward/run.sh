#!/usr/bin/env bash
# A judge trained by REAL rewards a policy that a stock OpenRLHF trains, on two cores without a GPU.
#
#   bash examples/judge_as_reward/run.sh              # SEED=1 bash ... for another seed
#
# Writes runs/judge_as_reward/seed_$SEED: judge/ (the trained judge), openrlhf.log, policy/, result.json.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
seed=${SEED:-0}
out=${OUT:-runs/judge_as_reward/seed_$seed}
here=examples/judge_as_reward

bash examples/install/cpu.sh
python=${VENV:-$root/.venv}/bin/python
export RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false
SECONDS=0
say() { echo "judge_as_reward [${SECONDS} s]: $*"; }

rm -rf "$out"
mkdir -p "$out"

say "data"
"$python" $here/task.py --output_dir "$out/data" --seed "$seed"

for who in judge policy; do
  say "a tiny $who: random weights, then a supervised start"
  "$python" examples/quickstart/make_model.py --words "$out/data/words.txt" --output_dir "$out/${who}_init" \
    --seed "$seed" --layers 2 --hidden 64
  "$python" examples/quickstart/warmup.py --model_name_or_path "$out/${who}_init" \
    --data "$out/data/${who}_sft.jsonl" --output_dir "$out/${who}_start" \
    --learning_rate 3e-3 --warmup_steps 20 --lr_scheduler cosine --batch_size 32 --max_steps 300 --max_len 64 \
    --seed "$seed" --log_steps 50 --device cpu
done

say "REAL trains the judge"
"$python" -m real_openrlhf.train_real \
  --actor.model_name_or_path "$out/judge_start" --data.prompt_dataset "$out/data/judge.jsonl" \
  --data.max_len 64 --rollout.batch_size 16 --rollout.n_samples_per_prompt 8 --rollout.max_new_tokens 24 \
  --train.max_steps 20 --actor.adam.lr 2e-4 --real.scale 1-5 --real.anchor "score " --real.keep_groups all \
  --real.device cpu --train.seed "$seed" --ckpt.output_dir "$out/judge"

say "the judge serves rewards"
port=$("$python" $here/server.py port)
"$python" -m real_openrlhf.judge serve --rewards --model "$out/judge/model" --template $here/template.txt \
  --labels unused --max_new_tokens 24 --device cpu --port "$port" >"$out/judge.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null && wait "$server" || true' EXIT
"$python" $here/server.py wait "http://127.0.0.1:$port" "$server" || { tail -n 20 "$out/judge.log" >&2; exit 1; }

say "a stock OpenRLHF trains the policy by RLOO"
"$python" -m real_openrlhf.patch openrlhf.cli.train_ppo_ray --real.device cpu \
  --reward.remote_url "http://127.0.0.1:$port/get_reward" \
  --actor.model_name_or_path "$out/policy_start" --actor.num_gpus_per_node 1 \
  --data.prompt_dataset "$out/data/policy.jsonl" --data.input_key prompt --data.max_len 32 \
  --vllm.num_engines 1 --vllm.enforce_eager \
  --algo.advantage.estimator rloo --algo.kl.init_coef 0 \
  --rollout.batch_size 32 --rollout.n_samples_per_prompt 8 --rollout.max_new_tokens 10 --rollout.micro_batch_size 32 \
  --train.batch_size 256 --train.micro_batch_size 64 --train.num_episodes 1 --train.seed "$seed" \
  --actor.adam.lr 1e-3 --actor.lr_scheduler constant --actor.lr_warmup_ratio 0 \
  --ckpt.output_dir "$out/policy" 2>&1 | tee "$out/openrlhf.log" \
  | { grep --line-buffered -o -E "on a CPU:.*|Global step [0-9]+|'rollout/reward_mean': [-0-9.e]+" || true; } \
  || { tail -n 40 "$out/openrlhf.log" >&2; exit 1; }

say "report"
"$python" $here/report.py --log "$out/openrlhf.log" --before "$out/policy_start" --after "$out/policy" \
  --prompts "$out/data/policy.jsonl" --output "$out/result.json" --seed "$seed"
say "done: $out/result.json"
