"""A human label as the loss needs it. No torch here: a scale is parsed before it is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """A label y as the loss needs it: y = (1 - weight) * values[low] + weight * values[high]."""

    value: float
    low: int
    high: int
    weight: float
