"""How responses are sampled: what a controller asks engines and judges for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled.

    temperature   0 is greedy
    seed          None: the engine's own random state decides
    continues     the prompts continue sequences that the engine has just computed, so it may keep its prefix cache
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None = None
    continues: bool = False
