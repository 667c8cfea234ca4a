"""Drops the device code in a CUDA shared object that an sm_90 GPU does not run, so that the file compresses well.

    python examples/install/gpu_offline/trim.py FILE.so    # in place; the file keeps its size

Host code and sm_90 and sm_90a machine code stay. Each box (fatbin) is rewritten with the entries that stay, and zeros
follow them. Small PTX is kept in boxes without sm_90 code; large PTX there belongs to quantised kernels for other
chips. A box where nothing stays gets the file's smallest piece of other code, so that none is empty.
"""

import struct
import sys
from pathlib import Path

KEEP_PTX = 100_000


def boxes(data):
    magic, i = struct.pack("<I", 0xBA55ED50), 0
    while (i := data.find(magic, i)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, i + 4)
        end = i + 16 + size
        if version != 1 or header != 16 or end > len(data):
            i += 4
            continue
        p, box = i + 16, []
        while p + 32 <= end:
            kind, _, head, n = struct.unpack_from("<HHIQ", data, p)  # kind 1: PTX, 2: machine code
            (arch,) = struct.unpack_from("<I", data, p + 28)
            if not head or p + head + n > end:
                raise SystemExit(f"unknown fatbin entry at {p:#x}: leave this file untrimmed")
            box.append((kind, arch, p, head + n))
            p += head + n
        yield i, end, box
        i = end


def main(path):
    data = bytearray(Path(path).read_bytes())
    kept = dropped = 0
    found = list(boxes(data))
    others = [(n, p) for _, _, box in found for _, arch, p, n in box if arch != 90]
    filler = bytes(data[min(others)[1] : sum(min(others))]) if others else b""
    for at, end, box in found:
        native = any(kind == 2 and arch == 90 for kind, arch, _, _ in box)
        stay = [
            e for e in box
            if (e[0] == 2 and e[1] == 90) or (e[0] == 1 and e[1] <= 90 and not native and e[3] < KEEP_PTX)
        ]  # fmt: skip
        body = b"".join(bytes(data[p : p + n]) for _, _, p, n in stay) or filler
        struct.pack_into("<Q", data, at + 8, len(body))
        data[at + 16 : end] = body.ljust(end - at - 16, b"\0")
        kept += len(body)
        dropped += end - at - 16 - len(body)
    Path(path).write_bytes(data)
    print(f"{path.rsplit('/', 1)[-1]}: device code kept {kept / 1e6:.1f} MB, dropped {dropped / 1e6:.1f} MB")


main(sys.argv[1])
