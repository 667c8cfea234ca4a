"""Which of a data set's aspects are built, and on which scale."""

from __future__ import annotations

from collections.abc import Sequence

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.row import DataError, nearest


def choose_aspects(
    builder: Builder, asked: Sequence[str] | None, scale: str | None
) -> tuple[tuple[str, ...], str | None]:
    """(aspects, scale); asked and scale as the flags have them, None where they are not given.

    Without --aspect: those that are rated on the scale. Without --scale: that of the aspects asked for, or the data
    set's own. Raises DataError for unknown aspects, and for aspects of several scales or of another one than --scale.
    """
    if not builder.aspects:
        if asked:
            raise DataError(f"--aspect: {builder.name} has no aspects to choose from; drop the flag")
        return (), scale or builder.scale
    if asked is None:
        chosen = scale or builder.scale
        fitting = tuple(name for name, own in builder.aspects.items() if _fits(own, chosen))
        if not fitting:
            raise DataError(f"--scale {chosen}: {builder.name} has no aspect that is rated on it; {_known(builder)}")
        return fitting, chosen
    for name in asked:
        if name not in builder.aspects:
            hint = nearest(name, list(builder.aspects))
            raise DataError(f"--aspect: {builder.name} has no aspect {name!r}{hint}; {_known(builder)}")
    chosen = scale or builder.aspects[asked[0]]
    for name in asked:
        if not _fits(builder.aspects[name], chosen):
            raise DataError(
                f"--aspect {name}: it is rated {builder.aspects[name]}, not {chosen}; a data set has one scale, so "
                "build each scale by itself"
            )
    return tuple(dict.fromkeys(asked)), chosen


def _fits(own: str, scale: str | None) -> bool:
    """Lowest and highest value are the same: a scale may have other values between them."""
    if scale is None:
        return False
    a, b = ScoreScale.parse(own).values, ScoreScale.parse(scale).values
    return (a[0], a[-1]) == (b[0], b[-1])


def _known(builder: Builder) -> str:
    return "there are " + ", ".join(f"{name} ({scale})" for name, scale in builder.aspects.items())
