"""GPT-4's judgements of MT-Bench answers, 1 to 10, each with its critique, pooled from several runs of the benchmark.

A question's two turns are one group. A row may average several judgements (`n`); its critique is then that of one of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import Builder, FieldError, Item, Options, Parts, get, label, optional_text, text
from real_openrlhf.data.row import shorten


def read(values: Mapping[str, Any], options: Options) -> Item:
    question, n = get(values, "question_id"), values.get("n", 1)
    if isinstance(question, bool) or not isinstance(question, (int, str)):
        raise FieldError("question_id", f"expected a number or text, got {shorten(question)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise FieldError("n", f"expected how many judgements were averaged, got {shorten(n)}")
    meta = {key: values[key] for key in ("question_id", "turn", "model", "judge", "repo") if key in values}
    return Item(
        id="/".join(str(meta[key]) for key in ("question_id", "turn", "model", "repo") if key in meta),
        label=label(values, options.label_key or "score", options.scale),
        group=f"mtbench:{question}",
        parts=Parts(
            instruction=text(values, "instruction"),
            response=text(values, "response"),
            reference=optional_text(values, "reference"),
            context=optional_text(values, "context"),
        ),
        critique=optional_text(values, "feedback"),
        n=n,
        meta=meta,
    )


BUILDER = Builder(
    name="mtbench_pool",
    about="GPT-4's judgements of MT-Bench answers, 1 to 10, with critiques for a warm-up",
    read=read,
    scale="1-10",
    template="single_answer",
    fractions={"train": 0.8, "dev": 0.1, "test": 0.1},
    shuffle=True,
    critiques=True,
)
