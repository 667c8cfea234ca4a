#!/usr/bin/env bash
# Run on the machine without a network, in the checkout: unpacks the files next to this one into SITE (default /tmp/site;
# files of CARRY into the checkout) and writes SITE/env.sh, which is to be sourced in the checkout. Nothing is installed
# into the machine's Python (PYTHON, default python3).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
site=$(realpath -m "${SITE:-/tmp/site}")
pieces=$site.pieces
mkdir -p "$site" "$pieces"
SECONDS=0
# Pieces that an earlier call has taken are missing here.
(cd "$here" && sha256sum --check --quiet --ignore-missing SHA256SUMS) || {
  [ "$(find "$here" -name '*.tar.xz*' ! -name '*.last' | wc -l)" = 0 ] ||
    { echo "unpack: files of $here are incomplete; copy this part again" >&2; exit 1; }
}
find "$here" -maxdepth 1 -name '*.tar.xz.*' -exec mv -t "$pieces" {} +

"$python" - "$here" "$pieces" "$site" <<'PY'
import re, sys, tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

here, pieces, site = map(Path, sys.argv[1:])


class Joined:
    """Files, read one after the other."""

    def __init__(self, paths):
        self.paths, self.file = list(paths), None

    def read(self, n=-1):
        while True:
            if self.file is None:
                if not self.paths:
                    return b""
                self.file = self.paths.pop(0).open("rb")
            if data := self.file.read(n):
                return data
            self.file.close()
            self.file = None


def unpack(name, paths):
    target = Path.cwd() if name.startswith("carry-") else site
    with tarfile.open(fileobj=Joined(paths), mode="r|xz") as tar:
        tar.extractall(target, filter="fully_trusted")
    return name


def whole():
    """Archives that are here with all their pieces."""
    for path in sorted(here.glob("*.tar.xz")):
        yield path.name, [path]
    for last in sorted(pieces.glob("*.last")):
        name = last.name.removesuffix(".last")
        found = sorted(p for p in pieces.glob(f"{name}.*") if re.fullmatch(r"\d+", p.name.rpartition(".")[2]))
        # The last piece came with `.last`, so it is among them; parts may come in any order.
        if [int(p.name.rpartition(".")[2]) for p in found] == list(range(len(found))):
            yield name, found


if __name__ == "__main__":
    archives = dict(whole())
    with ProcessPoolExecutor() as pool:
        print("unpacked:", ", ".join(pool.map(unpack, archives, archives.values())) or "nothing yet")
    for name, paths in archives.items():
        if paths[0].parent == pieces:
            for path in [*paths, pieces / f"{name}.last"]:
                path.unlink()
PY
unpacked=$SECONDS
# Otherwise every process that imports vLLM compiles its modules, where PYTHONDONTWRITEBYTECODE is set; -j 0: all cores.
"$python" -W ignore -m compileall -q -j 0 "$site" >"$site.compile.log" || echo "unpack: not all of it compiles; see $site.compile.log"
cat >"$site/env.sh" <<ENV
export PYTHONPATH=$site:\$PWD\${PYTHONPATH:+:\$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=disabled
# Not packed, or compiled at start otherwise.
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0
ENV
left=$(find "$pieces" -type f ! -name '*.last' | wc -l)
echo "unpack: $unpacked s, compiling $((SECONDS - unpacked)) s, $(du -sm "$site" | cut -f1) MB in $site$([ "$left" = 0 ] || echo ", $left pieces wait for another part")"
