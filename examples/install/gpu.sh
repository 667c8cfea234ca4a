#!/usr/bin/env bash
# Builds the GPU stack (OpenRLHF 0.11.2 with its pins, vLLM, DeepSpeed, Liger) in a venv, or reuses it.
#
#   bash examples/install/gpu.sh            # makes .venv in the checkout
#   VENV=/some/where bash examples/install/gpu.sh
#
# NOT RUN YET as a whole. The versions are OpenRLHF's own pins and the order follows from how the packages build.
#
# Needs an NVIDIA driver >= 580 (vLLM's wheel is built for CUDA 13), Python 3.10 to 3.12 and a C++ compiler. It does not
# need the CUDA toolkit. With an nvcc of torch's own CUDA version on the PATH, DeepSpeed's FusedAdam and CPU Adam are
# compiled now, which --ds.enable_sleep under ZeRO 3 and --ds.adam_offload take; otherwise at the first start that asks
# for them, by an nvcc that must be there then.
#   FLASH_ATTN=build   compiles flash-attn's kernels, some 30 minutes; needs nvcc. MAX_JOBS bounds the compilers: about
#                      4 GiB of memory each. Training does not call them: attention over packed rows is torch's own
#                      flash attention. By default only flash-attn's Python part is installed, which OpenRLHF imports
#   DRIVER_CHECK=skip  for an older driver with NVIDIA's package cuda-compat-13-0 (data-center cards only) in place
#   GPU_CHECK=skip     on a machine without a GPU, for an image that runs elsewhere (examples/kubernetes): asks nothing of
#                      driver and GPU, and checks imports only
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${VENV:-$root/.venv}
flash=${FLASH_ATTN:-skip}
stamp=$venv/.real_openrlhf_gpu
want=$({ cat "$root/examples/install/gpu.sh" "$root/setup.py"; echo "$root $flash"; } | sha256sum | cut -d' ' -f1)
log=${INSTALL_LOG:-$root/.install.log}

fail() { echo "install: $*" >&2; exit 1; }

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  echo "install: reusing $(basename "$venv")"
  exit 0
fi
[ ! -e "$venv" ] || [ -f "$stamp" ] || fail "$venv exists and was not made by this script (perhaps by cpu.sh); choose another VENV or remove it"

case $flash in build | skip) ;; *) fail "FLASH_ATTN is 'build' or 'skip', got '$flash'" ;; esac
case ${DRIVER_CHECK:-} in '' | skip) ;; *) fail "DRIVER_CHECK is 'skip' or unset, got '$DRIVER_CHECK'" ;; esac
case ${GPU_CHECK:-} in '' | skip) ;; *) fail "GPU_CHECK is 'skip' or unset, got '$GPU_CHECK'" ;; esac
if [ "${GPU_CHECK:-}" != skip ]; then
  command -v nvidia-smi >/dev/null || fail "nvidia-smi was not found: no NVIDIA driver. Without a GPU use examples/install/cpu.sh"
  nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader || fail "nvidia-smi finds no GPU (see above)"
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  if [ "${DRIVER_CHECK:-}" != skip ] && ! [ "${driver%%.*}" -ge 580 ] 2>/dev/null; then
    fail "driver $driver is too old: vLLM 0.29.0 and its torch are built for CUDA 13, which needs 580 or newer. Update the driver; on data-center cards NVIDIA's package cuda-compat-13-0 does as well (then set DRIVER_CHECK=skip)"
  fi
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -V | tail -n 1)
  [ "${capability%%.*}" -ge 8 ] 2>/dev/null || fail "no GPU with bf16: compute capability $capability, 8.0 or higher is needed (A100, L4, H100, RTX 30 and later)"
fi
command -v c++ >/dev/null || command -v g++ >/dev/null || fail "no C++ compiler (c++ or g++) on the PATH"
if [ "$flash" = build ]; then
  command -v nvcc >/dev/null || fail "nvcc was not found: FLASH_ATTN=build compiles with it. Put the CUDA toolkit on the PATH, or leave FLASH_ATTN out"
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
vllm() { pip install "vllm==0.29.0"; }
deepspeed() {
  local toolkit of_torch
  toolkit=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  of_torch=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)')
  if [ -n "$toolkit" ] && [ "$toolkit" = "$of_torch" ]; then
    # Without pip's cache, which may hold a wheel that has no operators.
    DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 pip install --no-cache-dir --no-build-isolation "deepspeed==0.19.6"
  else
    echo "nvcc: ${toolkit:-none}, torch's CUDA: $of_torch; DeepSpeed's operators are not compiled now"
    pip install --no-build-isolation "deepspeed==0.19.6"
  fi
}
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
imports() {
  "$venv/bin/python" -c "import deepspeed, openrlhf.trainer.ray.ppo_actor, ray, real_openrlhf, torch, vllm; print(torch.__version__)"
}
check() {
  "$venv/bin/python" - <<'PY'
import deepspeed, openrlhf.trainer.ray.ppo_actor, ray, torch, vllm
from torch.nn.attention.varlen import varlen_attn
from real_openrlhf.common.device import Device, flash_attn_available

assert torch.cuda.is_available(), "torch sees no GPU"
device = Device.resolve("cuda")
# A matrix product in bf16 with sums in fp32, as the output layer has it.
a, b = (torch.randn(256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
exact = a.double() @ b.double()
error = (torch.mm(a, b, out_dtype=torch.float32).double() - exact).abs().max() / exact.abs().max()
assert error < 1e-4, f"a bf16 product is off by {error:.1e}"
# Attention within segments of 40 and 24 tokens, forward and backward, against plain fp32.
q, k, v = (torch.randn(64, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
ends = torch.tensor([0, 40, 64], device="cuda", dtype=torch.int32)
found = varlen_attn(q, k, v, ends, ends, 40, 40)
plain = torch.cat([
    torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", x, y) / 8).softmax(-1), z)
    for x, y, z in zip(*(t.float().split([40, 24]) for t in (q, k, v)))
])
weight = torch.randn_like(plain)
for one, other in zip([found, *torch.autograd.grad(found, (q, k, v), weight.bfloat16())], [plain, *torch.autograd.grad(plain, (q, k, v), weight)]):
    error = (one.float() - other.float()).abs().max()
    assert error < 0.05, f"torch's flash attention is off by {error:.1e}"
print(torch.__version__, torch.version.cuda, torch.cuda.device_count(), "GPUs,", device.dtype_name, device.attn_implementation)
print("flash-attn's own kernels:", flash_attn_available(), "; torch's flash attention and a bf16 product: right")
PY
}

rm -rf "$venv"
step "venv" "$python" -m venv "$venv"
step "pip and build tools" pip install --upgrade "pip<26" "setuptools>=78,<81" wheel ninja packaging psutil numpy
step "vllm 0.29.0 with its torch" vllm
# vLLM may have put another setuptools in place; what builds without isolation needs this one.
step "build tools again" pip install "setuptools>=78,<81"
step "deepspeed 0.19.6" deepspeed
step "flash-attn 2.8.3 ($([ "$flash" = build ] && echo "compiling takes a while" || echo "its Python part"))" flash_attn
step "openrlhf[vllm] 0.11.2" pip install "openrlhf[vllm]==0.11.2"
step "real_openrlhf[gpu] with its dev tools" pip install --no-build-isolation -e "${root}[gpu,dev]"
if [ "${GPU_CHECK:-}" = skip ]; then step "imports" imports; else step "imports, and kernels on the GPU" check; fi
tail -n 2 "$log"
echo "$want" >"$stamp"
echo "install: done in $SECONDS s"
