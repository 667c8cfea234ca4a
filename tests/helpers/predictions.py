"""Hand-made predictions for the tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.predictions import Prediction, SampledFeedback


def make_prediction(
    row: int = 0,
    label: float = 3.0,
    probs: Sequence[float | None] | None = (0.1, 0.2, 0.4, 0.2, 0.1),
    decoded: float | None = 3.0,
    *,
    benchmark: str = "flask",
    group: str | None = None,
    forced: bool = False,
    scale: str = "1-5",
    **changes: Any,
) -> Prediction:
    """One sample; probs None: no score could be read."""
    values = ScoreScale.parse(scale).values
    distribution = None if probs is None else tuple(probs)
    known = None if probs is None or None in probs else [float(p) for p in probs if p is not None]
    expected = None if known is None else sum(v * p for v, p in zip(values, known))
    reason = None if probs is not None else "no_anchor"
    sample = SampledFeedback(
        feedback="fine",
        token_ids=(4, 5, 6),
        position=None if probs is None else 2,
        distribution=distribution,
        expected=expected,
        decoded=decoded,
        reason=reason,
        forced=forced,
        n_generated=3,
    )
    fields: dict[str, Any] = dict(
        benchmark=benchmark,
        row=row,
        group=str(row) if group is None else group,
        label=label,
        expected=expected,
        decoded=decoded,
        distribution=distribution,
        mass=None if known is None else sum(known),
        entropy=None,
        reason=reason,
        samples=(sample,),
    )
    return Prediction(**{**fields, **changes})


def make_predictions(n: int, *, seed: int = 0, benchmark: str = "flask", group_size: int = 2) -> list[Prediction]:
    """n rows on 1 to 5 with labels in thirds; every 10th has no score, every 7th no written one."""
    rng = np.random.default_rng(seed)
    values = np.arange(1.0, 6.0)
    rows = []
    for i in range(n):
        label = float(np.round(rng.uniform(1, 5) * 3) / 3)
        logits = -((values - label - rng.normal()) ** 2) / 2
        probs = np.exp(logits) / np.exp(logits).sum() * rng.uniform(0.8, 1.0)
        written = None if i % 7 == 6 else float(rng.choice(values, p=probs / probs.sum()))
        unread = i % 10 == 9
        rows.append(
            make_prediction(
                i,
                label,
                None if unread else probs.tolist(),
                None if unread else written,
                benchmark=benchmark,
                group=str(i // group_size),
            )
        )
    return rows
