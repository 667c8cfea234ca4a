"""PandaLM's test set: pairs of responses of small models, each with the votes of three people.

The form is that of WeOpenML/PandaLM's `data/testset-v1.json`: instruction, input, response1, response2 and annotator1
to annotator3, 1 or 2 for the better response and 0 for a tie (README, section "Test Data").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import FieldError, group_of, optional_text, text
from real_openrlhf.data.builders.pairs.base import Pair, PairBuilder
from real_openrlhf.data.preferences import TIE, A, B
from real_openrlhf.data.row import shorten

LABELS = {"0": TIE, "1": A, "2": B}
_ANNOTATOR = re.compile(r"annotator\d+")


def read(values: Mapping[str, Any]) -> Pair:
    votes = {}
    for column in sorted(filter(_ANNOTATOR.fullmatch, values)):
        vote = values[column]
        if isinstance(vote, bool) or str(vote) not in LABELS:
            raise FieldError(column, f"expected 0 (a tie), 1 or 2, got {shorten(vote)}")
        votes[column] = LABELS[str(vote)]
    if not votes:
        raise FieldError("annotator1", f"no such column; the columns are {list(values)}")
    more = optional_text(values, "input")
    question = text(values, "instruction") + (f"\n\n{more}" if more else "")
    meta = {key: values[key] for key in ("idx", "motivation_app", "cmp_key") if key in values}
    return Pair(
        id=None if "idx" not in meta else str(meta["idx"]),
        instruction=question,
        response_a=text(values, "response1", blank=True),
        response_b=text(values, "response2", blank=True),
        votes=votes,
        group=f"pandalm:{group_of(question)}",
        meta=meta,
    )


BUILDER = PairBuilder(
    name="pandalm",
    about="PandaLM's test set: 999 pairs with the votes of three people, ties among them",
    read=read,
)
