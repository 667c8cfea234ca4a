"""Does a judge know how sure it is? Accuracy, confidence and the expected calibration error (ECE).

A score (E[score], or the one that was written) decides for the label nearest to it, at a tie for the lower one. The
decision is right when it is the label nearest to the human score y; if y is half way between two labels, either is
right. The confidence is the probability of the decided label in the judge's score distribution: over the full
vocabulary or, with `renormalise`, given that the score is on the scale, as for E[score].

    ECE = sum over bins b of n_b / n * |mean confidence in b - share of right decisions in b|

with 10 bins of equal width over [0, 1], each closed on the right (Guo et al. 2017, "On Calibration of Modern Neural
Networks").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.metrics import Floats

N_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bin of a reliability diagram: (low, high], its rows, their mean confidence and share of right decisions."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def decide(score: float, scale: ScoreScale) -> int:
    """Index of the label nearest to a score; for scores below or above the scale, its first or last label."""
    target = scale.target(min(max(score, scale.values[0]), scale.values[-1]))
    return target.high if target.weight > 0.5 else target.low


def is_right(score: float, label: float, scale: ScoreScale) -> bool:
    """Whether the label that the score decides for is nearest to y; raises ScaleError for a y off the scale."""
    return scale.is_correct(decide(score, scale), scale.target(label))


def confidence(score: float, distribution: Sequence[float], scale: ScoreScale, *, renormalise: bool = False) -> float:
    """Probability of the decided label; distribution: [S] probabilities of the full vocabulary."""
    total = sum(distribution) if renormalise else 1.0
    return distribution[decide(score, scale)] / total if total > 0 else 0.0


def ece(confidences: Floats, right: Floats) -> float | None:
    """[n] confidences in [0, 1] and [n] 0 or 1; None without rows."""
    if not len(right):
        return None
    gaps = np.bincount(_bin_of(confidences), weights=confidences - right, minlength=N_BINS)
    return float(np.abs(gaps).sum() / len(right))


def weighted_ece(confidences: Floats, right: Floats, counts: np.ndarray) -> Floats:
    """`ece` on resamples: counts [resamples, n] says how often each row is in it."""
    member = _bin_of(confidences)[:, None] == np.arange(N_BINS)
    gaps = counts.astype(np.float64) @ ((confidences - right)[:, None] * member)
    return np.abs(gaps).sum(axis=1) / counts.sum(axis=1)


def share(indicator: Floats, _: Floats) -> float | None:
    """Mean of an indicator [n], that is an accuracy or a rate, with the signature of a metric; None without rows."""
    return float(indicator.mean()) if len(indicator) else None


def weighted_share(indicator: Floats, _: Floats, counts: np.ndarray) -> Floats:
    """`share` on resamples."""
    return counts.astype(np.float64) @ indicator / counts.sum(axis=1)


def reliability_bins(confidences: Floats, right: Floats) -> list[Bin]:
    """The bins that hold rows, for a diagram."""
    index = _bin_of(confidences)
    return [
        Bin(
            low=b / N_BINS,
            high=(b + 1) / N_BINS,
            n=int((index == b).sum()),
            confidence=float(confidences[index == b].mean()),
            accuracy=float(right[index == b].mean()),
        )
        for b in range(N_BINS)
        if (index == b).any()
    ]


def _bin_of(confidences: Floats) -> np.ndarray:
    """Bin of each confidence. 0 is in the first bin; a sum that rounding put above 1 is in the last."""
    return np.clip(np.ceil(confidences * N_BINS).astype(int) - 1, 0, N_BINS - 1)
