"""JudgeBench: pairs of answers to hard questions, one of them right by an objective check.

The form is that of ScalerLab/JudgeBench's `data/*.jsonl` (README, section "Dataset"), which its copy on the hub shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import FieldError, get, group_of, optional_text, text
from real_openrlhf.data.builders.pairs.base import Pair, PairBuilder
from real_openrlhf.data.preferences import A, B
from real_openrlhf.data.row import shorten

LABELS = {"A>B": A, "B>A": B}


def read(values: Mapping[str, Any]) -> Pair:
    label = get(values, "label")
    if not isinstance(label, str) or label not in LABELS:
        raise FieldError("label", f"expected {' or '.join(LABELS)}, got {shorten(label)}")
    question = text(values, "question")
    pair, source = values.get("pair_id"), optional_text(values, "source")
    return Pair(
        id=None if pair is None else str(pair),
        instruction=question,
        response_a=text(values, "response_A", blank=True),
        response_b=text(values, "response_B", blank=True),
        votes={"check": LABELS[label]},
        group=f"judgebench:{group_of(question)}",
        subset=source,
        meta={key: values[key] for key in ("original_id", "response_model") if key in values},
    )


BUILDER = PairBuilder(
    name="judgebench",
    about="JudgeBench: pairs of answers of which one is right by an objective check",
    read=read,
)
