"""Seconds per phase: by the clock on a CPU, by CUDA events on a GPU, whose work ends later than the Python code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from real_openrlhf.common.device import Device


class Timers:
    """Adds up the seconds of each phase until they are taken. Phases do not nest.

    on_end  called with the phase's name after its end; this time is not counted
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.on_end: Callable[[str], None] | None = None
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self.mark()))
            if self.on_end is not None:
                self.on_end(name)

    def wrap(self, name: str | Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed. name: of the phase, or a function that gives the name at each call."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        self.device.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            seconds[name] = seconds.get(name, 0.0) + self.between(start, end)
        self._spans = []
        return seconds

    def mark(self) -> Any:
        """A point in time: of the clock, or in the GPU's work."""
        if not self.device.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two points in time. Synchronise first: the GPU must have reached both."""
        return start.elapsed_time(end) / 1000.0 if self.device.is_cuda else end - start
