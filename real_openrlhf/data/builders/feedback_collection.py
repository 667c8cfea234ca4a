"""Feedback Collection, the paper's training set: about 100,000 judgements by GPT-4, each with feedback and a rubric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import (
    Builder,
    Item,
    Options,
    Parts,
    group_of,
    label,
    optional_text,
    question_of,
    rubric_of,
    text,
)

SCORES = tuple("12345")


def read(values: Mapping[str, Any], options: Options) -> Item:
    """One row of Feedback Collection, or of Feedback Bench, which has the same columns."""
    parts = Parts(
        instruction=text(values, "orig_instruction"),
        response=text(values, "orig_response", blank=True),
        reference=optional_text(values, "orig_reference_answer"),
        rubric=rubric_of(values, "orig_criteria", {score: f"orig_score{score}_description" for score in SCORES}),
    )
    return Item(
        label=label(values, options.label_key or "orig_score", options.scale),
        group=f"feedback:{group_of(question_of(parts.instruction))}",
        whole=text(values, "instruction"),
        parts=parts,
        # `output` is the same text followed by "[RESULT] N".
        critique=optional_text(values, "orig_feedback") or optional_text(values, "output"),
    )


BUILDER = Builder(
    name="feedback_collection",
    about="Feedback Collection: the paper's training set, with feedback for a warm-up",
    read=read,
    scale="1-5",
    template="source",
    sources=("train=prometheus-eval/Feedback-Collection@train",),
    fractions={"train": 1.0},
    shuffle=True,
    critiques=True,
)
