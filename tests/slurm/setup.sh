#!/usr/bin/env bash
# A Slurm cluster of two nodes on this host, in a folder of its own; it ends with the command, or with standard input.
#
#   bash tests/slurm/setup.sh FOLDER COMMAND ...   # runs COMMAND with SLURM_CONF set, then stops the cluster
#   bash tests/slurm/setup.sh FOLDER               # says "ready", and stops when its standard input is closed
#
# Exit code 77: Slurm is not here and cannot be installed, or is not to be (INSTALL_SLURM=1 installs it); standard error
# says why.
set -euo pipefail

mkdir -p "${1:?usage: setup.sh FOLDER [COMMAND ...]}"
folder=$(cd "$1" && pwd)
shift
export PATH=$PATH:/usr/sbin:/sbin
programs=(slurmctld slurmd munged sbatch srun scontrol)

missing() { for program in "${programs[@]}"; do command -v "$program" >/dev/null || echo "$program"; done; }
skip() { echo "no Slurm: $*" >&2; exit 77; }
if [ -n "$(missing)" ]; then
  [ -n "${INSTALL_SLURM:-}" ] || skip "$(missing | xargs) not found; bash tests/run.sh --slurm installs Debian's"
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    skip "$(missing | xargs) not found, and only root on Debian can install slurm-wlm and munge"
  fi
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge; } \
    >"$folder/apt.log" 2>&1 || skip "Debian's slurm-wlm and munge could not be installed: $(tail -n 1 "$folder/apt.log")"
  [ -z "$(missing)" ] || skip "$(missing | xargs) not found after the installation"
fi

# ---- daemons end with this script ------------------------------------------------------------------------
pids=()
stop() {
  trap - EXIT
  trap '' TERM INT
  scancel --user="$(id -u)" >/dev/null 2>&1 || true
  # Jobs first: their clean-up needs the daemons. Then the daemons, the last started first.
  for _ in $(seq 100); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep 0.3; done
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    kill -TERM "${pids[i]}" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "${pids[i]}" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "${pids[i]}" 2>/dev/null || true
  done
}
trap stop EXIT
trap 'stop; exit 143' TERM INT

# ---- configuration -----------------------------------------------------------------------------------------
read -r ctld n1 n2 < <(python3 - <<'PY'
import socket

held = [socket.socket() for _ in range(3)]
for s in held:
    s.bind(("", 0))
print(*[s.getsockname()[1] for s in held])
PY
)
export SLURM_CONF=$folder/slurm.conf
me=$(id -un)
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$ctld
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# A requeued job begins again when credentials have expired, 120 s by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=3600
JobRequeue=1
# Slurm ends the batch script of a job that is over its limit by this much, and no sooner.
OverTimeLimit=0
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$n1 CPUs=16 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$n2 CPUs=16 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
mkdir -p "$folder"/state "$folder"/spool-n{1,2}
(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
chmod 755 "$folder"

# ---- start ---------------------------------------------------------------------------------------------------
munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
  --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed" --log-file="$folder/munged.log" \
  >"$folder/munged.out" 2>&1 </dev/null &
pids+=($!)
for _ in $(seq 50); do [ -S "$folder/munge.socket" ] && break; sleep 0.1; done
slurmctld -D -f "$SLURM_CONF" >"$folder/slurmctld.out" 2>&1 </dev/null &
pids+=($!)
for node in n1 n2; do
  slurmd -D -N "$node" -f "$SLURM_CONF" >"$folder/slurmd-$node.out" 2>&1 </dev/null &
  pids+=($!)
done
for _ in $(seq 100); do
  [ "$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l)" = 2 ] && break
  sleep 0.3
done
[ "$(sinfo --noheader --Node --states=idle --format=%N | wc -l)" = 2 ] || {
  echo "the nodes did not come up; see $folder/*.log" >&2
  exit 1
}

if [ "$#" -gt 0 ]; then "$@"; else
  echo ready
  cat >/dev/null
fi
