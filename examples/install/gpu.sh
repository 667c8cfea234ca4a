#!/usr/bin/env bash
# Builds the GPU stack (OpenRLHF 0.11.2 with its pins, vLLM, flash-attn) in a venv, or reuses it.
#
#   bash examples/install/gpu.sh            # makes .venv in the checkout
#   VENV=/some/where bash examples/install/gpu.sh
#
# NOT RUN YET: no machine with a GPU was at hand when this was written. The versions are OpenRLHF's
# own pins and the order follows from how the packages build; the commands themselves are unproven.
#
# Needs an NVIDIA driver, the CUDA toolkit (nvcc, to compile flash-attn), Python 3.10 to 3.12 and a
# C++ compiler. MAX_JOBS bounds the compilers of flash-attn: about 4 GiB of memory each.
#   FLASH_ATTN=skip    leaves the compilation out; attention is then PyTorch's (sdpa), and flash-attn
#                      is installed without its kernels, because OpenRLHF imports its Python part
#   TORCH_INDEX=URL    a wheel index for another CUDA version than PyPI's torch is built for
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${VENV:-$root/.venv}
flash=${FLASH_ATTN:-build}
stamp=$venv/.real_openrlhf_gpu
want=$({ cat "$root/examples/install/gpu.sh" "$root/setup.py"; echo "$root $flash ${TORCH_INDEX:-}"; } | sha256sum | cut -d' ' -f1)
log=${INSTALL_LOG:-$root/.install.log}

fail() { echo "install: $*" >&2; exit 1; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  echo "install: reusing $(basename "$venv")"
  exit 0
fi
[ ! -e "$venv" ] || [ -f "$stamp" ] || fail "$venv exists and was not made by this script (perhaps by cpu.sh); choose another VENV or remove it"

case $flash in build | skip) ;; *) fail "FLASH_ATTN is 'build' or 'skip', got '$flash'" ;; esac
command -v nvidia-smi >/dev/null || fail "nvidia-smi was not found: no NVIDIA driver. Without a GPU use examples/install/cpu.sh"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || fail "nvidia-smi finds no GPU (see above)"
command -v c++ >/dev/null || command -v g++ >/dev/null || fail "no C++ compiler (c++ or g++) on the PATH"
if [ "$flash" = build ]; then
  command -v nvcc >/dev/null || fail "nvcc was not found: flash-attn is compiled with it. Put the CUDA toolkit on the PATH, or set FLASH_ATTN=skip"
  nvcc --version | tail -n 2
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.10 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || fail "Python 3.10 to 3.12 was not found; set PYTHON=/path/to/python3.11"

: >"$log"
step() {
  local what=$1
  shift
  echo "install: $what"
  "$@" >>"$log" 2>&1 || {
    echo "install: '$what' failed; the end of $log:" >&2
    tail -n 25 "$log" >&2
    exit 1
  }
}
pip() { "$venv/bin/python" -m pip "$@"; }
# The torch that vLLM 0.29.0 pins: flash-attn and deepspeed must be built against the one that stays.
vllm() { pip install "vllm==0.29.0" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}; }
flash_attn() {
  if [ "$flash" = skip ]; then
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
      pip install --no-deps --no-build-isolation "flash-attn==2.8.3"
    # flash_attn asks for its CUDA module on import; a file, so that every process sees it.
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    echo '"""Stands in for the CUDA kernels, which were not compiled."""' >"$site/flash_attn_2_cuda.py"
  else
    MAX_JOBS=${MAX_JOBS:-4} pip install --no-build-isolation "flash-attn==2.8.3"
  fi
}
check() {
  "$venv/bin/python" - <<'PY'
import deepspeed, openrlhf.trainer.ray.ppo_actor, ray, torch, vllm
from real_openrlhf.actors.device import Device, flash_attn_available

assert torch.cuda.is_available(), "torch sees no GPU"
device = Device.resolve("cuda")
print(torch.__version__, torch.version.cuda, torch.cuda.device_count(), "GPUs,", device.dtype_name, device.attn_implementation)
print("flash attention kernels:", flash_attn_available())
PY
}

rm -rf "$venv"
step "venv" "$python" -m venv "$venv"
step "pip and build tools" pip install --upgrade "pip<26" "setuptools>=78,<81" wheel ninja packaging psutil numpy
step "vllm 0.29.0 with its torch" vllm
# vLLM may have put another setuptools in place; what builds without isolation needs this one.
step "build tools again" pip install "setuptools>=78,<81"
step "deepspeed 0.19.6" pip install --no-build-isolation "deepspeed==0.19.6"
step "flash-attn 2.8.3 ($flash; compiling takes a while)" flash_attn
step "openrlhf[vllm] 0.11.2" pip install "openrlhf[vllm]==0.11.2"
step "real_openrlhf[gpu] with its dev tools" pip install --no-build-isolation -e "$root[gpu,dev]"
step "import check" check
tail -n 2 "$log"
echo "$want" >"$stamp"
echo "install: done in $SECONDS s"
