"""Where one step spends its time: torch's profiler, CUDA kernels by time, and how often Python waits for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from real_openrlhf.common.device import Device

TOP = 25
# Each makes Python wait. One item() appears as several of them, so they must not be added up.
SYNCS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)
# Calls of the CUDA runtime that cost time without computing.
CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMalloc", "cudaFree", "cuMem")


def profile_step(step: Callable[[], Any], device: Device, file: Path) -> dict[str, Any]:
    """Run a step under the profiler and write a text; {"step_seconds", "kernel_seconds", "syncs", "kernels"}.

    step_seconds are measured under the profiler, which slows Python down. On a CPU, operations are listed as kernels.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
    device.synchronize()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        launched = time.perf_counter() - start
        device.synchronize()
        seconds = time.perf_counter() - start
    averages = profiler.key_averages()
    found = summary(averages, on_gpu=device.is_cuda)
    found |= {"step_seconds": seconds, "python_seconds": launched}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text(found), encoding="utf-8")
    return found


def summary(averages: Any, *, on_gpu: bool) -> dict[str, Any]:
    """From the profiler's averages: {"kernel_seconds", "kernels", "operations", "syncs", "calls"}."""
    events = list(averages)

    def self_us(event: Any, name: str) -> float:
        # torch 2.4 renamed cuda to device.
        for attribute in (f"self_{name}_time_total", "self_cuda_time_total"):
            if hasattr(event, attribute):
                return float(getattr(event, attribute))
        return 0.0

    def on_device(event: Any) -> bool:
        # Annotations have device time too, namely that of the kernels inside them.
        user = getattr(event, "is_user_annotation", False)
        return str(getattr(event, "device_type", "")).endswith("CUDA") and not user

    def rows(chosen: list[Any], name: str) -> list[dict[str, Any]]:
        ordered = sorted(chosen, key=lambda e: -self_us(e, name))
        return [{"name": e.key, "calls": e.count, "ms": self_us(e, name) / 1e3} for e in ordered[:TOP]]

    of_device = [e for e in events if on_device(e)]
    of_host = [e for e in events if not on_device(e)]
    kernels, name = (of_device, "device") if on_gpu else (of_host, "cpu")
    return {
        "kernel_seconds": sum(self_us(e, name) for e in kernels) / 1e6,
        "kernels": rows(kernels, name),
        "operations": rows(of_host, "device" if on_gpu else "cpu"),
        "host": rows(of_host, "cpu"),
        "syncs": {e.key: e.count for e in of_host if e.key in SYNCS},
        "calls": {e.key: {"calls": e.count, "ms": self_us(e, "cpu") / 1e3} for e in of_host if e.key.startswith(CALLS)},
    }


def text(found: dict[str, Any]) -> str:
    """The summary as text."""
    busy = found["kernel_seconds"] / found["step_seconds"] if found["step_seconds"] else 0.0
    lines = [
        f"one step under the profiler: {found['step_seconds']:.3f} s, {found['python_seconds']:.3f} s until Python was "
        f"through; kernels {found['kernel_seconds']:.3f} s ({busy:.0%})",
        f"waits for the GPU: {found['syncs']}",
        *(f"{name}: {call['calls']} calls, {call['ms']:.1f} ms" for name, call in found["calls"].items()),
    ]
    for title, key in (
        ("kernels by time", "kernels"),
        ("operations by the time of their kernels", "operations"),
        ("operations by their own time on the host", "host"),
    ):
        lines += ["", title, *(f"{r['ms']:10.2f} ms {r['calls']:7d} x  {r['name'][:140]}" for r in found[key])]
    return "\n".join(lines) + "\n"
