"""A metric over the steps, as watches see it."""

from __future__ import annotations

import math
import statistics


class Series:
    """The first and the last values of a metric, a window of each. Undefined values are left out."""

    def __init__(self, window: int, first: list[float], last: list[float]) -> None:
        self.window, self.first, self.last = window, list(first), list(last)

    def add(self, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        if len(self.first) < self.window:
            self.first.append(value)
            return
        self.last = [*self.last, value][-self.window :]

    @property
    def full(self) -> bool:
        """Both windows are full; no value is in both."""
        return len(self.first) >= self.window and len(self.last) >= self.window

    @property
    def start(self) -> float:
        return statistics.fmean(self.first)

    @property
    def start_error(self) -> float | None:
        """The standard error of `start`; None for a single value."""
        return math.sqrt(statistics.variance(self.first) / len(self.first)) if len(self.first) > 1 else None

    @property
    def now(self) -> float:
        return statistics.fmean(self.last)
