#!/usr/bin/env bash
# Packs the GPU stack for a machine without a network that has PyTorch with CUDA: archives of a limited size, to be
# carried over one by one.
#
#   bash examples/install/gpu_offline.sh           # needs .venv (examples/install/cpu.sh), for its versions
#   PART_MB=1000 bash examples/install/gpu_offline.sh
#
# and on the other machine, in the checkout, for each part N in turn:
#
#   bash PARTS/N/unpack.sh && . /tmp/site/env.sh   # SITE=... for another folder
#   bash tests/gpu.sh
#
#   PARTS=.gpu          where the parts go: an ignored folder that holds nothing else
#   PART_MB=58          largest part
#   PYTHON_VERSION=3.12 of the other machine
#   TRIM=1              keeps only the kernels of sm_90 (H100, H200) in vLLM's files; 0: all of them, several times larger
#   CARRY="runs/model"  files and folders of the checkout that git ignores, such as a model, as further parts
#   WORK=/tmp/gpu-kit   downloads and archives, reused by the next call
#
# Part 1 holds Ray, DeepSpeed, OpenRLHF, transformers, Liger and the policy's side of vLLM, part 2 the rest of vLLM.
# Seen working on one H100 with Python 3.12, torch 2.11.0+cu130 and driver 580 (tests/gpu/results/h100). torch itself is
# not packed: 2.11 to 2.13 with CUDA 13 must be there, and so must triton, numpy, scipy, pyarrow, peft's accelerate and
# what else PyTorch images bring. FlashAttention 2 of vLLM, FlashInfer and flash-attn's kernels are left out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/examples/install/gpu_offline
cd "$root"
venv=${VENV:-$root/.venv}
py=$venv/bin/python
parts=${PARTS:-.gpu}
work=${WORK:-/tmp/gpu-kit}
python_version=${PYTHON_VERSION:-3.12}
trim=${TRIM:-1}
part_mb=${PART_MB:-58}
vllm=0.29.0
liger=0.8.5

fail() { echo "gpu_offline: $*" >&2; exit 1; }
say() { echo "gpu_offline [${SECONDS} s]: $*"; }
[ -x "$py" ] || fail "no $venv: run examples/install/cpu.sh first; the parts have its versions"
case $part_mb in '' | *[!0-9]* | 0) fail "PART_MB is a number of megabytes, got '$part_mb'" ;; esac
case $trim in 0 | 1) ;; *) fail "TRIM is 0 or 1, got '$trim'" ;; esac
for name in ${CARRY:-}; do
  case $name in /* | *..*) fail "CARRY names paths inside the checkout, got '$name'" ;; esac
  [ -e "$name" ] || fail "CARRY: there is no $root/$name"
done
case $python_version in 3.1[0-9]) ;; *) fail "PYTHON_VERSION is a version such as 3.12, got '$python_version'" ;; esac
limit=$((part_mb * 1024 * 1024))
site=$work/site
mkdir -p "$work"
SECONDS=0

platforms=(--no-deps --only-binary=:all: --python-version "$python_version" --implementation cp
  --abi "cp${python_version/./}" --abi abi3 --abi none --platform any)
for n in 5 12 17 24 26 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)

# tokenizers: transformers 5.15 refuses newer ones, which images may have.
policy="ray transformers openrlhf tokenizers pydantic pydantic-core annotated-types typing-inspection hjson
 jsonschema jsonschema-specifications referencing rpds-py datasets dill multiprocess torchdata jsonlines pylatexenc
 pynvml msgspec cachetools blake3 pyzmq cbor2 partial-json-parser pybase64 setproctitle python-json-logger
 fastapi starlette uvicorn loguru"
engine="openai httpx2 httpcore2 truststore jiter distro sniffio docstring-parser lark llguidance xgrammar
 outlines-core lm-format-enforcer interegular mistral-common pycountry pydantic-extra-types compressed-tensors depyf
 astor watchfiles ijson openai-harmony mcp mcp-types anthropic prometheus-fastapi-instrumentator
 opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai
 python-multipart httptools apache-tvm-ffi model-hosting-container-standards supervisor jmespath sse-starlette
 websockets pydantic-settings python-dotenv gguf"

pinned() { # the versions that the venv has
  local name
  for name in "$@"; do
    grep -iE "^${name//-/[-_.]}==" "$work/freeze" || fail "$name is not in $venv: make it anew with examples/install/cpu.sh"
  done
}

download() {
  local layer names
  for layer in 1 2; do
    names=$policy
    [ $layer = 1 ] || names=$engine
    # shellcheck disable=SC2086
    pinned $names >"$work/want$layer"
    [ $layer = 2 ] || echo "liger-kernel==$liger" >>"$work/want$layer"
    "$py" -m pip install -q --no-compile --no-warn-conflicts --target "$site/$layer" "${platforms[@]}" \
      -r "$work/want$layer" >"$work/pip$layer.log" 2>&1 || { tail -n 5 "$work/pip$layer.log" >&2; fail "pip found not all of part $layer"; }
  done
  compgen -G "$work/vllm-$vllm-*.whl" >/dev/null || "$py" -m pip download -q "${platforms[@]}" -d "$work" "vllm==$vllm"
}

vllm_files() {
  "$py" - "$work"/vllm-"$vllm"-*.whl "$site" <<'PY'
import sys, zipfile
wheel, site = sys.argv[1:]
# Left out: kernels of other chips, FlashAttention 2 (Hopper has 3), the Rust front end, what only servers show.
skip = ("vllm/vllm-rs", "vllm/vllm_flash_attn/_vllm_fa2", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100",
        "vllm/third_party/tml_fa4", "vllm/_flash", "vllm/_qutlass", "vllm/benchmarks", "vllm/_rust")
second = ("vllm/vllm_flash_attn/_vllm_fa3", "vllm/_moe_C")
with zipfile.ZipFile(wheel) as z:
    for name in z.namelist():
        if name.startswith(skip) or name.endswith((".jpg", ".png", ".ttf")) or "/static/" in name:
            continue
        z.extract(name, f"{site}/{2 if name.startswith(second) else 1}")
PY
  if [ "$trim" = 1 ]; then
    local so
    for so in "$site"/1/vllm/_C_*.so "$site"/2/vllm/_moe_C*.so; do "$py" "$here/trim.py" "$so"; done
  fi
}

from_the_venv() { # pure Python that PyPI has as source only
  local from
  from=$("$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  cp -r "$from"/deepspeed "$from"/deepspeed-*.dist-info "$from"/flash_attn "$from"/flash_attn-*.dist-info \
    "$from"/flash_attn_2_cuda.py "$site/1/"
  (cd "$site/1" && rm -rf bin tests ray/jars ray/cpp ray/rllib ray/tune ray/serve ray/llm ray/dashboard/client)
  (cd "$site/2" && rm -rf bin pycountry/locales mistral_common/data/*)
  find "$site" -name __pycache__ -prune -exec rm -rf {} +
}

compress() {
  # shellcheck disable=SC2010  # names of Python packages
  {
    echo "1 ray ray"
    echo "1 transformers transformers"
    echo "1 vllm vllm"
    echo "1 rest $(cd "$site/1" && ls | grep -vxE 'ray|transformers|vllm' | tr '\n' ' ')"
    echo "2 vllm vllm"
    echo "2 rest $(cd "$site/2" && ls | grep -vxE vllm | tr '\n' ' ')"
  } >"$work/jobs"
  export site work
  # shellcheck disable=SC2016
  xargs -P "$(nproc)" -I{} bash -c 'set -euo pipefail; set -- {}; layer=$1 name=$2; shift 2
    tar -C "$site/$layer" --sort=name --owner=0 --group=0 -cf - "$@" | xz -T1 -6 >"$work/pack/$layer/$name.tar.xz"' <"$work/jobs"
}

"$py" -m pip list --format=freeze 2>/dev/null >"$work/freeze"
stamp=$({ cat "$root/examples/install/gpu_offline.sh" "$here/trim.py" "$work/freeze"; echo "$trim $python_version"; } | sha256sum)
if [ "$(cat "$work/stamp" 2>/dev/null)" != "$stamp" ]; then
  rm -rf "$work/pack" "$site" "$work/stamp"
  mkdir -p "$work/pack/1" "$work/pack/2" "$site/1" "$site/2"
  say "wheels"; download
  say "vLLM"; vllm_files
  say "compressing"; from_the_venv; compress
  echo "$stamp" >"$work/stamp"
fi

folders=("$work/pack/1" "$work/pack/2")
if [ -n "${CARRY:-}" ]; then
  rm -rf "$work/pack/carry"
  mkdir -p "$work/pack/carry"
  # Weights compress badly: the quickest setting, on all cores.
  # shellcheck disable=SC2086
  tar --owner=0 --group=0 -cf - $CARRY | xz -T0 -1 >"$work/pack/carry/files.tar.xz"
  folders+=("$work/pack/carry")
fi
say "dividing"
bash "$here/divide.sh" "$parts" $limit "${folders[@]}"
