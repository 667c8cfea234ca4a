"""A monotone map from E[score] to human scores, fitted on held-out labels. Off by default.

Stored as calibration.json in the model's folder. Apart from ties it does not change the ranking, so Spearman's rho
changes little. It corrects a judge that is too mild, too harsh or too timid in general.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.common.numeric import CONSTANT
from real_openrlhf.export.settings import ExportError, read_json
from real_openrlhf.judge.types import CALIBRATION_METHODS

FILE = "calibration.json"
FORMAT = "real_openrlhf.calibration"
FORMAT_VERSION = 1
# Fewer rows say more about themselves than about the judge.
MIN_ROWS = 20


class CalibrationError(ValueError):
    """The calibration cannot be fitted or does not belong to this judge."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Piecewise linear between knots, constant outside of them (isotonic) or up to the scale's ends (linear).

    method       "isotonic" or "linear"
    x, y         knots, x strictly ascending, y not descending; y within the scale
    scale        the scale's text
    renormalise  how E[score] was computed
    n            number of rows that it was fitted on
    rmse_before, rmse_after   on these same rows, so the second is optimistic
    """

    method: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    scale: str
    renormalise: bool
    n: int
    rmse_before: float
    rmse_after: float

    def __post_init__(self) -> None:
        if self.method not in CALIBRATION_METHODS:
            raise CalibrationError(f"the method must be one of {', '.join(CALIBRATION_METHODS)}, got {self.method!r}")
        if len(self.x) != len(self.y) or len(self.x) < 2 or not all(map(_is_number, (*self.x, *self.y))):
            raise CalibrationError("x and y must be two lists of equally many finite numbers, at least two")
        if any(b <= a for a, b in zip(self.x, self.x[1:])) or any(b < a for a, b in zip(self.y, self.y[1:])):
            raise CalibrationError("x must ascend and y must not descend")

    @classmethod
    def fit(
        cls,
        scores: Sequence[float],
        labels: Sequence[float],
        *,
        scale: ScoreScale,
        method: str = "isotonic",
        renormalise: bool = False,
    ) -> Calibration:
        """Fit to E[score] and human labels of rows that the judge was not trained on.

        Raises CalibrationError for fewer than MIN_ROWS rows, constant scores or labels, labels off
        the scale, and for a linear fit with a falling line.
        """
        if method not in CALIBRATION_METHODS:
            raise CalibrationError(f"the method must be one of {', '.join(CALIBRATION_METHODS)}, got {method!r}")
        if len(scores) != len(labels):
            raise CalibrationError(f"{len(scores)} scores, but {len(labels)} labels")
        if len(scores) < MIN_ROWS:
            raise CalibrationError(f"a calibration needs at least {MIN_ROWS} labelled rows, got {len(scores)}")
        for i, label in enumerate(labels):
            if not _is_number(label) or not scale.values[0] <= label <= scale.values[-1]:
                raise CalibrationError(f"label {i} is {label!r}, not a number on the scale {scale}")
        x, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
        if not np.isfinite(x).all():
            raise CalibrationError("every score must be a finite number; leave out rows without a score")
        for name, values in (("scores", x), ("labels", y)):
            if np.ptp(values) <= CONSTANT * np.abs(values).max():
                raise CalibrationError(f"all {name} are {values[0]:g}: there is nothing to fit")
        knots_x, knots_y = _isotonic(x, y) if method == "isotonic" else _linear(x, y, scale)
        after = np.interp(x, knots_x, knots_y)
        return cls(
            method=method,
            x=tuple(map(float, knots_x)),
            y=tuple(map(float, knots_y)),
            scale=str(scale),
            renormalise=renormalise,
            n=len(x),
            rmse_before=float(np.sqrt(np.mean((x - y) ** 2))),
            rmse_after=float(np.sqrt(np.mean((after - y) ** 2))),
        )

    def __call__(self, score: float) -> float:
        return float(np.interp(score, self.x, self.y))

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / FILE
        content = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path, *, scale: ScoreScale, renormalise: bool) -> Calibration:
        """Raises CalibrationError when there is none, or when its scale or renormalise differ from these."""
        path = Path(folder) / FILE
        try:
            content = read_json(path)
        except ExportError as error:
            hint = "; make it with `python -m real_openrlhf.judge calibration fit`" if not path.exists() else ""
            raise CalibrationError(f"{error}{hint}") from error
        if (content.pop("format", None), content.pop("version", None)) != (FORMAT, FORMAT_VERSION):
            raise CalibrationError(f"{path} is not a {FORMAT} file of version {FORMAT_VERSION}")
        try:
            values: dict[str, Any] = {k: tuple(v) if k in ("x", "y") else v for k, v in content.items()}
            found = cls(**values)
        except (TypeError, CalibrationError) as error:
            raise CalibrationError(f"{path}: {error}") from error
        if (found.scale, found.renormalise) != (str(scale), renormalise):
            raise CalibrationError(
                f"{path} was fitted on the scale {found.scale} (renormalise {found.renormalise}), but the judge uses "
                f"{scale} (renormalise {renormalise}); fit it again"
            )
        return found


def _isotonic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pool-adjacent-violators; equal scores are pooled first. Knots: both ends of every block."""
    unique, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(where, weights=y) / counts
    fitted = optimize.isotonic_regression(means, weights=counts).x
    # Rounding errors must not make the fit descend.
    fitted = np.maximum.accumulate(fitted)
    if fitted[-1] - fitted[0] <= CONSTANT * np.abs(fitted).max():
        raise CalibrationError("the labels do not rise with the scores at all: calibration cannot help")
    inner = np.r_[True, (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:]), True]
    return unique[inner], fitted[inner]


def _linear(x: np.ndarray, y: np.ndarray, scale: ScoreScale) -> tuple[np.ndarray, np.ndarray]:
    """Least squares, clipped to the scale: two knots, where the line reaches the ends of the scale."""
    line = stats.linregress(x, y)
    if not line.slope > 0:
        raise CalibrationError(
            f"the labels do not rise with the scores (slope {line.slope:.3g}): calibration cannot help"
        )
    ends = np.array([scale.values[0], scale.values[-1]])
    return (ends - line.intercept) / line.slope, ends


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
