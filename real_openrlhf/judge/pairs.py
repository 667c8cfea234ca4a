"""Two responses compared: each scored by itself, or both in one prompt, which is asked in both orders.

In one prompt the judge's own template is used, and its scale for which of the two is better: both responses stand where
one does otherwise, and the rubric says that the highest score is for the first and the lowest for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.preferences import TIE, A, B
from real_openrlhf.judge.rubrics import SINGLE, as_dimensions
from real_openrlhf.judge.types import JudgeError

SCORES, ONE_PROMPT = "scores", "one_prompt"
MODES = (SCORES, ONE_PROMPT)
_BETTER = "Which of the two answers is better?"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """difference: above 0 where a is better, in units of the scale. winner: "a", "b" or "tie". in_order: with both in
    one prompt, the winner where a comes first, and where b does; None where each was scored by itself."""

    difference: float
    winner: str
    in_order: tuple[str, str] | None = None

    @property
    def consistent(self) -> bool | None:
        """Whether both orders have the same winner."""
        return None if self.in_order is None else self.in_order[0] == self.in_order[1]


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise JudgeError(f"there is no mode {mode!r} of comparison; there are {', '.join(MODES)}")
    return mode


def check_tie_margin(margin: float) -> float:
    if not margin >= 0:
        raise JudgeError(f"the tie margin must not be negative, got {margin}")
    return margin


def verdict(
    first: float | None, second: float | None, *, mode: str, scale: ScoreScale, tie_margin: float
) -> Verdict | None:
    """first, second: the scores of a and of b, or in one prompt the scores where a comes first and where b does. None
    where one is missing.

    In one prompt a score tells how far it lies above the middle of the scale, and half the difference of the two orders
    is the preference: what a judge adds for the place of an answer cancels.

    >>> scale = ScoreScale.parse("1-5")
    >>> verdict(4.0, 3.5, mode="one_prompt", scale=scale, tie_margin=0.0)
    Verdict(difference=0.25, winner='a', in_order=('a', 'b'))
    """
    if first is None or second is None:
        return None
    if mode == SCORES:
        return Verdict(difference=first - second, winner=_winner(first - second, tie_margin))
    middle = (scale.values[0] + scale.values[-1]) / 2
    difference = (first - second) / 2
    in_order = _winner(first - middle, tie_margin), _winner(middle - second, tie_margin)
    return Verdict(difference=difference, winner=_winner(difference, tie_margin), in_order=in_order)


def one_prompt(item: Mapping[str, Any], first: str, second: str, scale: ScoreScale) -> dict[str, Any]:
    """An item of `Judge.score_batch` that asks which of two responses is better; item: its other parts."""
    for response in (first, second):
        if not isinstance(response, str):
            raise JudgeError(f"a response is text, not {type(response).__name__}")
    rubrics = {name: _comparing(rubric, scale) for name, rubric in as_dimensions(item.get("rubric")).items()}
    return {
        **item,
        "response": f"[First answer]\n{first}\n[End of the first answer]\n\n"
        f"[Second answer]\n{second}\n[End of the second answer]",
        "rubric": rubrics[SINGLE] if set(rubrics) == {SINGLE} else rubrics,
    }


def _comparing(rubric: Rubric | str | None, scale: ScoreScale) -> Rubric:
    """What its scores stand for is left out: that is said of one response."""
    by = rubric.criteria if isinstance(rubric, Rubric) else rubric
    descriptions = {scale.labels[0]: "The second answer is much better."}
    middle = (scale.values[0] + scale.values[-1]) / 2
    if middle in scale.values:
        descriptions[scale.labels[scale.values.index(middle)]] = "Both answers are equally good."
    descriptions[scale.labels[-1]] = "The first answer is much better."
    return Rubric(criteria=f"{_BETTER} Judge by this: {by.strip()}" if by else _BETTER, descriptions=descriptions)


def _winner(difference: float, margin: float) -> str:
    return TIE if abs(difference) <= margin else A if difference > 0 else B
