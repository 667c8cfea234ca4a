"""How responses are drawn: what a controller asks engines and judges for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    temperature   0 is greedy
    seed          None leaves the engine's own
    continues     the prompts go on behind what the engine has just been asked: it may keep what it computed for that
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None = None
    continues: bool = False
