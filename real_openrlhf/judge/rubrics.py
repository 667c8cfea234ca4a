"""Reads rubrics in the forms that users give, and combines the scores of several dimensions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_openrlhf.common.paths import expand
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.judge.types import JudgeError, Score

# One rubric: Prometheus's parts, free text, or the fields of its data sets.
OneRubric = Rubric | str | Mapping[str, object]
AnyRubric = OneRubric | Mapping[str, OneRubric] | None

_DESCRIPTION = re.compile(r"(?:orig_)?score_?(\w+?)_description")
SINGLE = ""


def as_dimensions(rubric: AnyRubric) -> dict[str, Rubric | str | None]:
    """Dimensions by name. A single rubric (or None, no rubric) has the name "".

    A mapping with a key "criteria" is one rubric given by its fields: criteria and either descriptions (score -> text)
    or score1_description, score2_description, ... (also with "orig_" in front, as in Prometheus's data). In any other
    mapping, each key is a dimension.
    """
    if rubric is None or isinstance(rubric, (Rubric, str)):
        return {SINGLE: rubric}
    if not isinstance(rubric, Mapping):
        raise JudgeError(f"a rubric is a text, a Rubric or a mapping, not {type(rubric).__name__}")
    if _is_fields(rubric):
        return {SINGLE: _from_fields(rubric)}
    if not rubric:
        raise JudgeError("the rubric has no dimension")
    found: dict[str, Rubric | str | None] = {}
    for name, one in rubric.items():
        if not isinstance(name, str) or not name.strip():
            raise JudgeError(f"a dimension of the rubric needs a name, got {name!r}")
        if isinstance(one, Mapping) and _is_fields(one):
            one = _from_fields(one)
        if not isinstance(one, (Rubric, str)):
            raise JudgeError(
                f"the dimension {name!r} of the rubric must be a text, a Rubric or a mapping with 'criteria', not "
                f"{type(one).__name__}; if this was meant as one rubric, its key 'criteria' is missing"
            )
        found[name] = one
    return found


def _is_fields(rubric: Mapping[str, object]) -> bool:
    return "criteria" in rubric or "orig_criteria" in rubric


def _from_fields(rubric: Mapping[str, object]) -> Rubric:
    descriptions: dict[str, str] = {}
    for key, value in rubric.items():
        if key in ("criteria", "orig_criteria"):
            continue
        match = _DESCRIPTION.fullmatch(key)
        if key == "descriptions" and isinstance(value, Mapping):
            descriptions |= {str(score): text for score, text in value.items()}
        elif match:
            descriptions[match[1]] = value  # type: ignore[assignment]  # Rubric checks it
        else:
            raise JudgeError(
                f"a rubric has no field {key!r}; it has criteria, and descriptions or score1_description ..."
            )
    return Rubric(criteria=rubric.get("criteria", rubric.get("orig_criteria")), descriptions=descriptions)  # type: ignore[arg-type]


def read_rubric(text: str, flag: str) -> Any:
    """From a flag: text, or a .json or .txt file; JSON may hold several dimensions."""
    path = Path(expand(text))
    if path.suffix not in (".json", ".txt"):
        return text
    try:
        content = path.read_text(encoding="utf-8")
        return json.loads(content) if path.suffix == ".json" else content
    except (OSError, ValueError) as error:
        raise JudgeError(f"{flag} {text}: {error}") from error


def check_weights(weights: Mapping[str, float] | None, names: set[str]) -> None:
    """JudgeError unless weights name exactly these dimensions, with positive numbers."""
    if weights is None:
        return
    if names == {SINGLE}:
        raise JudgeError("weights are for a rubric of several dimensions, but there is one")
    if set(weights) != names:
        raise JudgeError(f"weights are given for {sorted(weights)}, but the dimensions are {sorted(names)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise JudgeError(f"the weight of {name!r} must be a positive number, got {weight!r}")


def combine(scores: Mapping[str, Score], weights: Mapping[str, float] | None) -> Score:
    """The mean over the dimensions, weighted if weights are given; a value is None if a dimension does not have it."""
    if set(scores) == {SINGLE}:
        return scores[SINGLE]
    share = {name: 1.0 if weights is None else float(weights[name]) for name in scores}
    total = sum(share.values())

    def mean(field: str) -> float | None:
        values = {name: getattr(score, field) for name, score in scores.items()}
        if any(value is None for value in values.values()):
            return None
        return sum(share[name] * value for name, value in values.items()) / total

    lost = [f"{name}: {score.reason}" for name, score in scores.items() if score.score is None]
    return Score(
        score=mean("score"),
        decoded=mean("decoded"),
        distribution=None,
        mass=None,
        entropy=None,
        feedback="\n\n".join(f"{name}: {score.feedback}" for name, score in scores.items()),
        reason="; ".join(lost) or None,
        n_forced=sum(score.n_forced for score in scores.values()),
        n_invalid=sum(score.n_invalid for score in scores.values()),
        calibrated=mean("calibrated"),
        dimensions={name: replace(score) for name, score in scores.items()},
    )
