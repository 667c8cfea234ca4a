"""Rounds a fractional label to one that the model can write. Only a warm-up needs this: REAL uses fractions as they
are."""

from __future__ import annotations

import random
from collections.abc import Callable

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.target import Target


def stochastic(target: Target, rng: random.Random) -> int:
    """3.8 becomes 4 with probability 0.8, else 3: so the expected score that a warm-up learns is the label itself."""
    return target.high if rng.random() < target.weight else target.low


def nearest(target: Target, rng: random.Random) -> int:
    """The nearer neighbour, with halves rounded up. The fraction is lost; `rng` is not used."""
    return target.high if target.weight >= 0.5 else target.low


ROUNDINGS: dict[str, Callable[[Target, random.Random], int]] = {"stochastic": stochastic, "nearest": nearest}


def written_label(label: float, scale: ScoreScale, rounding: str, rng: random.Random) -> str:
    """The text of one of the label's neighbours on the scale, chosen by `rounding`."""
    return scale.labels[ROUNDINGS[rounding](scale.target(label), rng)]
