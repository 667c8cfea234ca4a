"""LLMBar: pairs of outputs of which one follows the instruction, by its authors.

The form is that of princeton-nlp/LLMBar's `Dataset/**/dataset.json` (README, section "Data"): input, output_1, output_2
and label, 1 or 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import FieldError, get, group_of, optional_text, text
from real_openrlhf.data.builders.pairs.base import Pair, PairBuilder
from real_openrlhf.data.preferences import A, B
from real_openrlhf.data.row import shorten

LABELS = {"1": A, "2": B}


def read(values: Mapping[str, Any]) -> Pair:
    label = get(values, "label")
    if isinstance(label, bool) or str(label) not in LABELS:
        raise FieldError("label", f"expected 1 or 2, got {shorten(label)}")
    question = text(values, "input")
    return Pair(
        instruction=question,
        response_a=text(values, "output_1", blank=True),
        response_b=text(values, "output_2", blank=True),
        votes={"authors": LABELS[str(label)]},
        group=f"llmbar:{group_of(question)}",
        subset=optional_text(values, "subset"),
    )


BUILDER = PairBuilder(
    name="llmbar",
    about="LLMBar: pairs of outputs of which one follows the instruction (a dataset.json of Natural or Adversarial)",
    read=read,
)
