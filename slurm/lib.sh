# What the batch scripts of this folder share; they source it. See slurm/README.md.
# shellcheck shell=bash
#
#   start_cluster              one Ray node per Slurm node; returns when all of them are there
#   on_cluster ARGUMENT ...    runs Python with these arguments on that cluster and ends the job with its exit code
#   alone ARGUMENT ...         the same without a cluster, for what needs one node only
#   flag NAME VALUE            adds both to the array `given` unless VALUE is empty
#   own_flags COMMAND FLAG ... -- ARGUMENT ...
#                              the script's flags, in the array `own`, but for those that ARGUMENTs or a --config give
#
# However the job ends, its processes, its token and its temporary folders go: `finish` below, `end` on every node.
set -euo pipefail

# ---- settings, from the environment ----------------------------------------------------------------------
root=${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the checkout}  # the script itself is a copy elsewhere
job=$SLURM_JOB_ID
nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}   # per node; 0 runs on CPUs
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
deadline=${READY_DEADLINE:-600}                   # seconds until all nodes must have joined
grace=${STOP_GRACE:-12}                           # seconds a run gets to end after SIGTERM; all within Slurm's KillWait
dashboard=$([ -n "${DASHBOARD:-}" ] && echo true || echo false)
# Node-local, one folder per node; short, or Ray's socket paths get too long.
export REAL_TMP=${RAY_TMP:-/tmp}/real_$job
tmp=$REAL_TMP.0

say() { echo "slurm [${SECONDS} s]: $*"; }
fail() { echo "slurm: $*" >&2; exit 1; }

# ---- clean-up, whatever the reason for the end: only our own processes and files ---------------------------
python='' probe_pid='' run_pid='' step_pid='' status=1 stopping='' made=''
trap 'finish' EXIT
trap 'status=143; finish' TERM INT
trap 'stop' USR1

# end_of PID SECONDS: asks it to end, and makes it when the time is over.
end_of() {
  kill -TERM "$1" 2>/dev/null || return 0
  gone "$1" "$2" || { kill -KILL "$1" 2>/dev/null || true; gone "$1" 1 || true; }
}
gone() {
  local tenths
  for ((tenths = 0; tenths < $2 * 10; tenths++)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  return 1
}

finish() {
  trap - EXIT
  trap '' TERM INT USR1
  # Without bash's word about it, which repeats the whole command.
  [ -z "$probe_pid" ] || end_of "$probe_pid" 1 2>/dev/null
  if [ -n "$run_pid" ] && kill -TERM "$run_pid" 2>/dev/null; then gone "$run_pid" "$grace" || kill_run; fi
  [ -z "$step_pid" ] || end_step
  if [ -n "$made" ]; then
    if [ -n "${KEEP_RAY_TMP:-}" ]; then rm -rf "$tmp/token" "$tmp/t"; else rm -rf "$tmp"; fi
    [ "$status" = 0 ] || [ -z "$step_pid" ] ||
      say "Ray's logs were in $REAL_TMP.*/ray/session_latest/logs on each node (KEEP_RAY_TMP=1 keeps them)"
  fi
  say "end, exit code $status"
  # Last, because Slurm then ends this script immediately.
  if [ "$status" = 85 ] && [ -z "${NO_REQUEUE:-}" ]; then
    scontrol requeue "$job" || say "could not be requeued; submit it again with the same arguments to resume"
  fi
  exit "$status"
}

# All that this script has started, by Slurm's own list, but for srun and its helper. At once, because what has lost its
# parent is on the list of some Slurms only.
kill_run() {
  local pid
  for pid in $(scontrol listpids "$job" "${SLURMD_NODENAME:-}" 2>/dev/null | awk '$3 == "batch" {print $1}' | sort -n); do
    [ "$pid" = $$ ] || [ "$pid" = "$step_pid" ] || [ "$(ps -o ppid= -p "$pid" | tr -d ' ')" = "${step_pid:-none}" ] ||
      kill -KILL "$pid" 2>/dev/null || true
  done
  kill -KILL "$run_pid" 2>/dev/null || true
}

# srun answers SIGTERM with SIGKILL for the tasks, which then cannot clean up; so the tasks get their SIGTERM from Slurm.
end_step() {
  kill -0 "$step_pid" 2>/dev/null || return 0
  local step=$job
  # Not there while the nodes begin; without it every step of the job gets the signal, and this script does not.
  [ ! -s "$tmp/step" ] || step+=.$(cat "$tmp/step")
  if scancel --signal=TERM "$step" 2>/dev/null; then
    gone "$step_pid" 12 && return 0
  fi
  end_of "$step_pid" 3
}

# Exit code 85 means: run again. Before the run has begun there is nothing to save.
stop() {
  stopping=yes
  say "SIGUSR1: stopping, to resume in another allocation"
  if [ -n "$run_pid" ]; then
    kill -"$stop_signal" "$run_pid" 2>/dev/null || true
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge 2 ]; then
    fail "the signal came before the run began, in attempt $((SLURM_RESTART_COUNT + 1)): --time must be longer than the seconds of --signal=B:USR1@SECONDS and the start"
  else
    status=85
    finish
  fi
}

# A folder that nobody else can look into: it holds the token and Ray's sockets. Names in /tmp can be guessed, so what
# is there already is used only if it is ours: left by this job before it was requeued.
make_tmp() {
  [ ! -O "$tmp" ] || rm -rf "$tmp"
  mkdir -p "$(dirname "$tmp")"
  mkdir -m 700 "$tmp" || fail "cannot make $tmp; set RAY_TMP to a node-local folder that you can write"
  made=yes
  mkdir "$tmp/t"
  export TMPDIR=$tmp/t
}

# ---- Python: a venv, whatever ENV_SETUP activates, or a container ---------------------------------------------
find_python() {
  [ -z "$python" ] || return 0
  read -ra container <<<"${CONTAINER:-}"
  # Scripts of conda and of modules use variables that are not set.
  set +u
  # shellcheck source=/dev/null
  [ -z "${ENV_SETUP:-}" ] || . "$ENV_SETUP" || fail "ENV_SETUP=$ENV_SETUP failed on $(hostname)"
  set -u
  if [ -n "${PYTHON:-}" ]; then python=$PYTHON
  elif [ -n "${CONTAINER:-}" ]; then python=python3
  elif [ -n "${ENV_SETUP:-}" ]; then python=$(command -v python || echo python)
  else python=$root/.venv/bin/python; fi
  [ -n "${CONTAINER:-}" ] || command -v "$python" >/dev/null ||
    fail "no python at $python; install first (examples/install/gpu.sh), or set PYTHON, ENV_SETUP or CONTAINER"
  export REAL_PYTHON=$python
}
py() { "${container[@]}" "$python" "$@"; }

# ---- the cluster ----------------------------------------------------------------------------------------------
# Ports differ between jobs on one node. Below the range from which Linux takes ports itself (32768..); tested before
# they are used.
free_base() {
  py - "$job" <<'PY'
import socket, sys

for shift in range(50):
    base = 20000 + (int(sys.argv[1]) + shift) % 400 * 30
    try:
        for port in range(base, base + 30):
            with socket.socket() as s:
                s.bind(("", port))
    except OSError:
        continue
    print(base)
    break
else:
    sys.exit("no free range of ports in 20000..31999")
PY
}

# What every node runs, with prctl(PR_SET_CHILD_SUBREAPER): a process whose parent ends becomes this script's child, so that
# Slurm still knows it, however it keeps track of processes.
adopting='import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execvp("bash", ["bash", "-c", sys.argv[1]])'

# One Slurm step: when one of its tasks ends, all end. --block: Ray's processes end with their task.
read -r -d '' node_script <<'NODE' || true
set -euo pipefail
tmp=$REAL_TMP.$SLURM_PROCID
pid='' made=''
end() {
  trap - EXIT
  trap '' TERM INT
  if [ -n "$pid" ]; then
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 40); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
    # Slurm ends what is left of a step as well, but later, when it would have written to the folder again.
    left=$(scontrol listpids "$SLURM_JOB_ID.$SLURM_STEP_ID" "${SLURMD_NODENAME:-}" 2>/dev/null | awk 'NR > 1 {print $1}' | sort -n)
    for other in $left; do [ "$other" = "$$" ] || kill -KILL "$other" 2>/dev/null || true; done
  fi
  if [ -n "${KEEP_RAY_TMP:-}" ]; then rm -rf "$tmp/token" "$tmp/t"; elif [ -n "$made" ]; then rm -rf "$tmp"; fi
}
trap end EXIT
# Exit code 0: it was told to end.
trap 'end; exit 0' TERM INT
# The token comes on standard input: there it is on no command line, and in no environment that a program might print.
read -r token
if [ "$SLURM_PROCID" != 0 ]; then
  [ ! -O "$tmp" ] || rm -rf "$tmp"
  mkdir -p "$(dirname "$tmp")"
  mkdir -m 700 "$tmp"
  mkdir "$tmp/t"
  (umask 077 && printf '%s\n' "$token" >"$tmp/token")
fi
made=yes
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$tmp/token TMPDIR=$tmp/t
unset token
set +u
# shellcheck source=/dev/null
[ -z "${ENV_SETUP:-}" ] || . "$ENV_SETUP" || { echo "ENV_SETUP=$ENV_SETUP failed on $(hostname)" >&2; exit 1; }
set -u
ulimit -n 65535 2>/dev/null || ulimit -n "$(ulimit -Hn)"
read -ra ray <<<"${CONTAINER:-}"
ray+=("$REAL_PYTHON" -m ray.scripts.scripts start)
common=(
  --num-gpus="$REAL_NODE_GPUS" --num-cpus="$REAL_NODE_CPUS" --disable-usage-stats --block
  --temp-dir="$tmp/ray" --dashboard-agent-listen-port=$((REAL_AGENT_PORT + SLURM_PROCID % 24))
)
if [ "$SLURM_PROCID" = 0 ]; then
  echo "$SLURM_STEP_ID" >"$tmp/step"
  "${ray[@]}" --head --node-ip-address="$REAL_HEAD" --port="$REAL_GCS_PORT" \
    --ray-client-server-port="$REAL_CLIENT_PORT" --include-dashboard="$REAL_DASHBOARD" \
    --dashboard-host=127.0.0.1 --dashboard-port="$REAL_DASHBOARD_PORT" "${common[@]}" </dev/null >"$tmp/start.log" 2>&1 &
else
  until (exec 3<>"/dev/tcp/$REAL_HEAD/$REAL_GCS_PORT") 2>/dev/null; do
    [ "$SECONDS" -lt "$REAL_DEADLINE" ] || { echo "node $SLURM_PROCID: no Ray head after $SECONDS s" >&2; exit 1; }
    sleep 1
  done
  "${ray[@]}" --address="$REAL_HEAD:$REAL_GCS_PORT" "${common[@]}" </dev/null >"$tmp/start.log" 2>&1 &
fi
pid=$!
status=0
wait "$pid" || status=$?
echo "node $SLURM_PROCID ($(hostname)): Ray ended with exit code $status; its last lines:" >&2
tail -n 15 "$tmp/start.log" >&2
exit "$((status ? status : 1))"
NODE

start_cluster() {
  find_python
  make_tmp
  # Anyone who can connect to Ray's ports can run code, so every Ray process of this job asks for this token.
  (umask 077 && py -c 'import secrets; print(secrets.token_hex(32))' >"$tmp/token")
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$tmp/token RAY_USAGE_STATS_ENABLED=0
  local base head_node head_ip
  base=$(free_base)
  head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)   # batch scripts run on the first node
  head_ip=$(py -c 'import ray.util; print(ray.util.get_node_ip_address())')
  export REAL_HEAD=$head_ip REAL_GCS_PORT=$base REAL_DASHBOARD_PORT=$((base + 1)) REAL_CLIENT_PORT=$((base + 2))
  export REAL_AGENT_PORT=$((base + 5)) REAL_NODE_GPUS=$gpus REAL_NODE_CPUS=$cpus
  export REAL_DEADLINE=$deadline REAL_DASHBOARD=$dashboard
  say "$nodes node(s), $gpus GPUs and $cpus CPUs each; head $head_node ($head_ip), ports from $base"
  ulimit -n 65535 2>/dev/null || ulimit -n "$(ulimit -Hn)"
  # Since Slurm 22.05 a step does not inherit --cpus-per-task. Its standard input goes to every task.
  local node=(bash -c "$node_script") host_python=$python
  [ "${#container[@]}" = 0 ] || host_python=$(command -v python3 || true)
  [ -z "$host_python" ] || node=("$host_python" -c "$adopting" "$node_script")
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 --wait=20 "${node[@]}" <"$tmp/token" &
  step_pid=$!
  export RAY_ADDRESS=$head_ip:$REAL_GCS_PORT
  write_session
  wait_for_cluster
  [ "$dashboard" = false ] ||
    say "dashboard: ssh -L 8265:127.0.0.1:$REAL_DASHBOARD_PORT $head_node, then http://127.0.0.1:8265; its token: slurm/README.md"
}

# What attach.sh reads.
write_session() {
  local bin=''
  case $python in /*) bin=$(dirname "$python"): ;; esac
  printf 'export %s=%q\n' RAY_ADDRESS "$RAY_ADDRESS" RAY_AUTH_MODE token RAY_AUTH_TOKEN_PATH "$tmp/token" \
    TMPDIR "$tmp/t" PATH "$bin$PATH" CONTAINER "${CONTAINER:-}" >"$tmp/session"
}

# Polls until the cluster is complete; a dead step or the deadline ends the wait.
wait_for_cluster() {
  local seen=''
  while true; do
    # In the background, because only `wait` lets a signal through immediately.
    timeout 60 "${container[@]}" "$python" - "$nodes" "$gpus" >"$tmp/seen" 2>/dev/null <<'PY' &
import logging, sys
import ray

nodes, gpus = int(sys.argv[1]), float(sys.argv[2])
ray.init(log_to_driver=False, logging_level=logging.ERROR)  # RAY_ADDRESS
alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
there = sum(r.get("GPU", 0) for r in alive)
print(f"{len(alive)} of {nodes} nodes, {there:g} of {nodes * gpus:g} GPUs")
sys.exit(not (len(alive) >= nodes and there >= nodes * gpus))
PY
    probe_pid=$!
    if wait "$probe_pid"; then break; fi
    probe_pid=''
    # An attempt that failed says nothing; what was seen before still counts.
    [ ! -s "$tmp/seen" ] || seen=$(cat "$tmp/seen")
    kill -0 "$step_pid" 2>/dev/null || fail "a Ray node ended before the cluster was complete (last seen: ${seen:-nothing})"
    [ "$SECONDS" -lt "$deadline" ] || fail "the cluster was not complete after $SECONDS s (READY_DEADLINE); last seen: ${seen:-nothing}"
    sleep 2
  done
  probe_pid=''
  say "cluster complete: $(cat "$tmp/seen")"
}

# ---- the run ------------------------------------------------------------------------------------------------------
on_cluster() {
  stop_signal=USR1
  cd "$root"
  # Started here, not by `ray job submit`: its exit code tells wrong input (2) from a failed run (1).
  "${container[@]}" "$python" "$@" &
  run_pid=$!
  # Wait until the run ends, or a Ray node that it needs.
  while kill -0 "$run_pid" 2>/dev/null; do
    if ! kill -0 "$step_pid" 2>/dev/null; then
      # The run may just have ended normally; then no node was lost.
      sleep 2
      kill -0 "$run_pid" 2>/dev/null && fail "a Ray node ended while the run was going on"
      break
    fi
    sleep 0.5
  done
  status=0
  wait "$run_pid" || status=$?
  run_pid=''
  # 138: killed by SIGUSR1 before it could handle it; it had not trained yet.
  if [ -n "$stopping" ] && [ "$status" = 138 ]; then status=85; fi
}

alone() {
  stop_signal=INT
  find_python
  make_tmp
  cd "$root"
  # Job control, since bash lets background commands ignore SIGINT otherwise.
  set -m
  "${container[@]}" "$python" "$@" &
  run_pid=$!
  set +m
  # A signal ends `wait`, but not yet the run.
  while kill -0 "$run_pid" 2>/dev/null; do wait "$run_pid" || true; done
  status=0
  wait "$run_pid" || status=$?
  run_pid=''
  # 130: interrupted. What it has judged is kept, and the same command continues.
  if [ -n "$stopping" ] && [ "$status" = 130 ]; then status=85; fi
}

given=()
flag() { [ -z "$2" ] || given+=("$1" "$2"); }

own=()
own_flags() {
  local command=$1 words; shift
  find_python
  words=$(cd "$root" && py -m real_openrlhf.config.script_flags "$command" $((nodes * gpus)) "$@") || { status=$?; finish; }
  # shellcheck disable=SC2034  # of the script that sources this
  [ -z "$words" ] || mapfile -t own <<<"$words"
}

# Flags, in the array `layout`, with which the policy and the engines share all GPUs and take turns; an engine takes two,
# or one where a node has an odd number. Without GPUs, half of the processes train and the others generate.
share_gpus() {
  if [ "$gpus" -gt 0 ]; then
    local width=$((gpus % 2 ? 1 : 2))
    # shellcheck disable=SC2034  # of the script that sources this
    layout=(
      --actor.num_nodes "$nodes" --actor.num_gpus_per_node "$gpus"
      --vllm.num_engines $((nodes * gpus / width)) --vllm.tensor_parallel_size "$width"
      --train.colocate_all --vllm.enable_sleep --ds.enable_sleep
    )
  else
    # shellcheck disable=SC2034
    layout=(--actor.num_nodes "$nodes" --actor.num_gpus_per_node 1 --vllm.num_engines "$nodes")
  fi
}
