"""The benchmark's memory peak, against allocations of a known size."""

from __future__ import annotations

import pytest
import torch

from examples.benchmark.memory import PeakMemory, release, status_bytes
from real_openrlhf.common.device import Device

MIB = 2**20
# What the process does besides; far below the allocations.
SLACK = 4 * MIB


def fill(mib: int) -> torch.Tensor:
    """So many MiB that are written to, hence resident."""
    return torch.ones(mib * MIB // 4)


def test_a_peak_that_is_gone_again_is_seen() -> None:
    memory = PeakMemory(Device.resolve("cpu"))
    kept = fill(32)
    fill(64)
    memory.mark("step")
    assert abs(memory.peaks["step"] - 96 * MIB) < SLACK
    del kept


def test_each_mark_takes_the_highest_since_the_last_one() -> None:
    memory = PeakMemory(Device.resolve("cpu"))
    fill(32)
    memory.mark("forward")
    kept = fill(16)
    fill(64)
    memory.mark("backward")
    memory.mark("optimizer")
    fill(8)
    memory.mark("forward")
    wanted = {"forward": 32, "backward": 80, "optimizer": 16}
    assert {name: round(peak / MIB) for name, peak in memory.peaks.items()} == pytest.approx(wanted, abs=4)
    del kept


def test_the_peak_starts_anew_and_what_is_held_does_not_count() -> None:
    kept = fill(64)
    fill(128)
    memory = PeakMemory(Device.resolve("cpu"))
    fill(32)
    memory.mark("step")
    assert abs(memory.peaks["step"] - 32 * MIB) < SLACK
    del kept


def test_memory_that_is_reserved_but_never_written_does_not_count() -> None:
    memory = PeakMemory(Device.resolve("cpu"))
    torch.empty(256 * MIB // 4)
    memory.mark("step")
    assert memory.peaks["step"] < SLACK


def test_freed_small_blocks_go_back_before_the_baseline_is_taken() -> None:
    """malloc keeps blocks this small in its heap: a step that reuses them would seem to need nothing."""
    blocks = [fill(1)[: 8 * 1024].clone() for _ in range(2000)]  # 32 KiB each
    del blocks
    release()
    memory = PeakMemory(Device.resolve("cpu"))
    blocks = [fill(1)[: 8 * 1024].clone() for _ in range(2000)]
    memory.mark("step")
    assert memory.peaks["step"] > 2000 * 32 * 1024 * 0.9
    del blocks


def test_fields_of_proc_status() -> None:
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t      16 kB\n"
    assert status_bytes("VmHWM", status) == 2 * MIB
    assert status_bytes("VmRSS", status) == 16 * 1024
    with pytest.raises(ValueError, match="VmSwap"):
        status_bytes("VmSwap", status)


def test_on_a_gpu_the_allocator_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    memory = PeakMemory(Device(name="cuda", dtype_name="bf16"))
    calls.clear()
    memory.mark("forward")
    assert memory.peaks == {"forward": 250}
    assert calls == ["reset_peak_memory_stats"]
