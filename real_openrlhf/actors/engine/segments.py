"""Shared memory whose name is gone ends with the last process that has mapped it, however that process ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

# Names that multiprocessing.shared_memory gives; vLLM's message queues are such segments.
_PREFIX = "psm_"
_FOLDER = Path("/dev/shm")


def unlink_mapped_segments() -> list[str]:
    """Remove the names of all segments that this process has mapped; returns those removed here. Linux only."""
    mapped = set()
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.split(maxsplit=5)[5:]
            if path and path[0].startswith(f"{_FOLDER}/{_PREFIX}") and not path[0].endswith(" (deleted)"):
                mapped.add(Path(path[0]))
    removed = []
    for segment in sorted(mapped):
        with suppress(OSError):  # another worker of the engine was faster
            segment.unlink()
            removed.append(segment.name)
    return removed
