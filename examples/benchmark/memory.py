"""The peak memory of some work, above what was held before it: RSS on a CPU, torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

from real_openrlhf.common.device import Device

_PROC = Path("/proc/self")
# Value for /proc/self/clear_refs that sets the high-water mark to the present RSS.
_RESET_PEAK = "5"


def status_bytes(name: str, status: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes. ValueError when it is missing."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def release() -> None:
    """Free what can be freed: first Python's reference cycles, then pages that malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Memory above a baseline, which is what the process holds when this is made.

    On a CPU it is the memory that the machine needed: pages that malloc keeps from one phase count in later ones too.

    peaks  bytes by name, see `mark`
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        release()
        if device.is_cuda:
            torch.cuda.synchronize()
            self._reset()
            self.baseline = int(torch.cuda.memory_allocated())
            return
        self._reset()
        self.baseline = status_bytes("VmRSS", self._status())

    def mark(self, name: str) -> None:
        """Record the peak since the last mark under `name`; of several marks with one name the highest counts."""
        if self.device.is_cuda:
            highest = int(torch.cuda.max_memory_allocated())
        else:
            highest = status_bytes("VmHWM", self._status())
        self.peaks[name] = max(self.peaks.get(name, 0), highest - self.baseline)
        self._reset()

    def _reset(self) -> None:
        if self.device.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            (_PROC / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")

    @staticmethod
    def _status() -> str:
        return (_PROC / "status").read_text(encoding="ascii")
