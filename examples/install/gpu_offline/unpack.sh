#!/usr/bin/env bash
# On the machine without a network, in the checkout: unpacks what lies beside this file into SITE (default /tmp/site) and
# writes SITE/env.sh, which is to be sourced in the checkout. Nothing is installed into the machine's Python.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${SITE:-/tmp/site}
pieces=$site.pieces
mkdir -p "$site" "$pieces"
SECONDS=0
for piece in "$here"/*.tar.xz.[0-9][0-9]; do # pieces of a large archive: kept until all are here
  if [ -e "$piece" ]; then mv "$piece" "$pieces/"; fi
done
for first in "$pieces"/*.tar.xz.00; do
  if [ -e "$first" ]; then
    # A cut archive that is not whole yet fails; the next call tries again.
    cat "${first%.00}".?? | python3 -c "
import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode='r|xz').extractall('$site', filter='fully_trusted')" 2>/dev/null &&
      rm "${first%.00}".?? || true
  fi
done
python3 - "$here" "$site" <<'PY'
import sys, tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

def unpack(archive):
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(sys.argv[2], filter="fully_trusted")
    return archive.name

if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        print("unpacked:", ", ".join(pool.map(unpack, sorted(Path(sys.argv[1]).glob("*.tar.xz")))))
PY
cat >"$site/env.sh" <<ENV
export PYTHONPATH=$site:\$PWD\${PYTHONPATH:+:\$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=disabled
# Not packed, or compiled at start otherwise.
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0
ENV
left=$(find "$pieces" -type f | wc -l)
echo "unpack: $SECONDS s, $(du -sm "$site" | cut -f1) MB in $site$([ "$left" = 0 ] || echo ", $left pieces wait for the next part")"
