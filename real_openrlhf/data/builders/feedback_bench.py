"""Feedback Bench, the test set of Feedback Collection: rubrics that the training set does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from real_openrlhf.data.builders import feedback_collection, prometheus
from real_openrlhf.data.builders.base import Builder, Item, Options

_read_prometheus = prometheus.reader("feedback")


def read(values: Mapping[str, Any], options: Options) -> Item:
    """Read both forms: Feedback Collection's columns, as on the hub, or Prometheus's `instruction` and `gpt4_score`."""
    if "orig_score" in values:
        # This is a test set, so its feedback is not used for training.
        return replace(feedback_collection.read(values, options), critique=None)
    return _read_prometheus(values, options)


BUILDER = Builder(
    name="feedback_bench",
    about="Feedback Bench: 1,000 responses to 200 instructions, each with its own rubric",
    read=read,
    scale="1-5",
    template="source",
    sources=("test=prometheus-eval/Feedback-Bench",),
)
