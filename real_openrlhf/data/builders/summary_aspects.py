"""The four aspects that summaries are rated by in SummEval and DialSummEval, 1 to 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.builders.base import FieldError, get, ratings
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.row import shorten

SCALE = "1-5"
RUBRICS = {
    "coherence": Rubric(
        criteria="Coherence: do the sentences of the summary build on each other and make one well-ordered text?",
        descriptions={"1": "A heap of unconnected sentences.", "5": "Well structured and easy to follow throughout."},
    ),
    "consistency": Rubric(
        criteria="Consistency: is everything that the summary says supported by the text that it summarizes?",
        descriptions={"1": "Most of it is wrong or made up.", "5": "Every statement is supported."},
    ),
    "fluency": Rubric(
        criteria="Fluency: is each sentence of the summary well written, without errors of grammar or spelling?",
        descriptions={"1": "Full of errors and hard to read.", "5": "Each sentence reads well."},
    ),
    "relevance": Rubric(
        criteria="Relevance: does the summary hold what is important in the text, and nothing that is not?",
        descriptions={"1": "The important points are missing.", "5": "All the important points and no others."},
    ),
}


def rated(
    values: Mapping[str, Any], column: str, aspects: Sequence[str], scale: ScoreScale
) -> dict[str, dict[str, float]]:
    """Aspect -> rater -> score, from a list that holds an object of aspect to score per rater."""
    listed = get(values, column)
    if not isinstance(listed, (list, tuple)) or not all(isinstance(one, Mapping) for one in listed):
        raise FieldError(column, f"expected a list with an object of scores per rater, got {shorten(listed)}")
    found = {}
    for aspect in aspects:
        scores = {}
        for number, one in enumerate(listed, start=1):
            if aspect not in one:
                raise FieldError(f"{column}.{aspect}", f"rater {number} has none; there are {list(one)}")
            scores[f"rater {number}"] = one[aspect]
        found[aspect] = ratings(scores, f"{column}.{aspect}", scale)
    return found
