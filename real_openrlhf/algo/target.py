"""A human label as the loss needs it. No torch here: scales are parsed before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Weights this close to 0.5 are ties: on a scale like 0.1, 0.2 the middle is not exact in floats.
_TIE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Target:
    """A label y as the loss needs it: y = (1 - weight) * values[low] + weight * values[high]."""

    value: float
    low: int
    high: int
    weight: float

    @property
    def nearest(self) -> tuple[int, ...]:
        """Indices of the labels nearest to y: one, or both neighbours if y is half way between them."""
        if math.isclose(self.weight, 0.5, rel_tol=0.0, abs_tol=_TIE):
            return (self.low, self.high)
        return (self.low,) if self.weight < 0.5 else (self.high,)

    def worst_squared_error(self, values: Iterable[float]) -> float:
        """max over v in the scale's values and 0 of (v - y)^2. 0: missing mass pulls E[score] towards it."""
        return max((v - self.value) ** 2 for v in (0.0, *values))
