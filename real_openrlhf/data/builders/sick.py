"""SICK: pairs of sentences and the mean of ten people's scores for their relatedness, 1 to 5, mostly fractional.

The form is that of the data set's own SICK.txt, tab-separated: pair_ID, sentence_A, sentence_B, relatedness_score,
SemEval_set and others. The scores of single raters are not published. Pairs that
occur in both orders stay, so that the test set is the one that others report on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import Builder, FieldError, Item, Options, Parts, group_of, label, text
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.row import shorten
from real_openrlhf.data.tsv import read_tsv_or_rows

SPLITS = {"TRAIN": "train", "TRIAL": "dev", "TEST": "test"}
RUBRIC = Rubric(
    criteria="How closely is the response related in meaning to the sentence in the instruction?",
    descriptions={"1": "Not related at all.", "5": "Very closely related."},
)


def read(values: Mapping[str, Any], options: Options) -> Item:
    first, second = (" ".join(text(values, name).split()) for name in ("sentence_A", "sentence_B"))
    named = values.get("SemEval_set")
    if named is not None and named not in SPLITS:
        raise FieldError("SemEval_set", f"expected {', '.join(SPLITS)}, got {shorten(named)}")
    pair = values.get("pair_ID", values.get("id"))
    return Item(
        id=None if pair is None else str(pair),
        label=label(values, options.label_key or "relatedness_score", options.scale),
        # The same for both orders of a pair.
        group=f"sick:{group_of(*sorted((first.lower(), second.lower())))}",
        parts=Parts(
            instruction=f"Write a sentence that is related in meaning to this one: {first}",
            response=second,
            rubric=RUBRIC,
        ),
        split=None if named is None else SPLITS[named],
        meta={key: values[key] for key in ("pair_ID", "entailment_label") if key in values},
    )


BUILDER = Builder(
    name="sick",
    about="SICK: human relatedness of sentence pairs, 1 to 5 (SICK.txt, with the splits of SemEval 2014)",
    read=read,
    rows=read_tsv_or_rows,
    scale="1-5",
    template="paper",
    shuffle=True,
)
