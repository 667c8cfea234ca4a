"""Watches that ask whether a judge still judges, while its reward may well rise: its feedback and its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from real_openrlhf.config.guard_flags import GuardConfig
from real_openrlhf.controller.series import Series

Metrics = Mapping[str, float | None]
# (name of a series, its newest value) -> the series with it.
Add = Callable[[str, float | None], Series]
_LOWER = "Lower --actor.adam.lr, or hold the policy at its start (--algo.kl.init_coef)"


def hacking_faults(metrics: Metrics, add: Add, flags: GuardConfig, scale_range: float) -> dict[str, str | None]:
    """Watch -> the fault in words, or None."""
    return {
        "repeated": _repeated(add("repeated", metrics.get("feedback/repeated")), flags.repeated_rise),
        "copied": _copied(add("copied", metrics.get("feedback/copied")), flags.copied_rise),
        "mentions": _mentions(add("mentions", metrics.get("feedback/mentions")), flags.min_mentions),
        "labels": _labels(add("labels", metrics.get("score/label_distance")), flags.label_distance_rise, scale_range),
    }


def _repeated(series: Series, rise: float | None) -> str | None:
    if rise is None or not series.full or series.now <= series.start + rise:
        return None
    return (
        f"Feedback repeats itself: {series.now:.0%} of its runs of 4 tokens were there before (the start: "
        f"{series.start:.0%}). {_LOWER}, and look at samples.jsonl (limit: --guard.repeated_rise)."
    )


def _copied(series: Series, rise: float | None) -> str | None:
    if rise is None or not series.full or series.now <= series.start + rise:
        return None
    return (
        f"Feedback copies the prompt: {series.now:.0%} of its tokens are in runs of 8 that the prompt has as well (the "
        f"start: {series.start:.0%}). {_LOWER}, and look at samples.jsonl (limit: --guard.copied_rise)."
    )


def _mentions(series: Series, share: float | None) -> str | None:
    if share is None or not series.full or series.start_error is None:
        return None
    # Where feedback never spoke of the response, nothing can be lost.
    if series.start <= 3 * series.start_error or series.now >= share * series.start:
        return None
    return (
        f"Feedback no longer speaks of the response that it judges: it shares {series.now:+.1%} more of its tokens "
        f"with it than with those of other prompts (the start: {series.start:+.1%}). {_LOWER}, and look at "
        "samples.jsonl (limit: --guard.min_mentions)."
    )


def _labels(series: Series, rise: float | None, scale_range: float) -> str | None:
    if rise is None or not series.full or series.now <= series.start + rise * scale_range:
        return None
    return (
        f"The scores are no longer distributed as the labels: they are {series.now:.2f} apart on average, in units of "
        f"the scale (the start: {series.start:.2f}; Wasserstein distance). See whether score/expected moves away from "
        f"label/mean. {_LOWER} (limit: --guard.label_distance_rise)."
    )
