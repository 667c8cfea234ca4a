"""The highest memory of a stretch of work above what was held before it: RSS on a CPU, torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

from real_openrlhf.actors.device import Device

_PROC = Path("/proc/self")
# Of /proc/self/clear_refs: the high-water mark becomes the present RSS.
_RESET_PEAK = "5"


def status_bytes(name: str, status: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes. ValueError when it is missing."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def release() -> None:
    """Give back what is free: Python's cycles first, then the pages that malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Memory above a baseline, which is what the process holds when this is made."""

    def __init__(self, device: Device) -> None:
        self.device = device
        release()
        if device.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.baseline = int(torch.cuda.memory_allocated())
            return
        (_PROC / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        self.baseline = status_bytes("VmRSS", self._status())

    def peak(self) -> int:
        """Bytes: the highest since the baseline was taken, minus the baseline."""
        if self.device.is_cuda:
            return int(torch.cuda.max_memory_allocated()) - self.baseline
        return status_bytes("VmHWM", self._status()) - self.baseline

    @staticmethod
    def _status() -> str:
        return (_PROC / "status").read_text(encoding="ascii")
