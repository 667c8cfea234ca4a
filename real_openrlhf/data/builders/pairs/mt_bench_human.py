"""MT-Bench's human votes: experts on pairs of answers of six models, one row per vote.

The form is that of the hub's lmsys/mt_bench_human_judgments (question_id, model_a, model_b, winner, judge,
conversation_a, conversation_b, turn), as lm-sys/FastChat's `fastchat/llm_judge/compute_agreement.py` reads it: the
votes on a question, a turn and two models are one pair, whichever of the models was shown first. Its votes by GPT-4, in
a split of their own, have the same form.

In the second turn each model answers after an answer of its own, so that the response is its conversation after the
first question.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from real_openrlhf.data.builders.base import FieldError, get, text
from real_openrlhf.data.builders.merge import merge_rows
from real_openrlhf.data.builders.pairs.base import Pair, PairBuilder
from real_openrlhf.data.preferences import TIE, A, B
from real_openrlhf.data.row import BadRow, Row, shorten
from real_openrlhf.data.sources import read_rows

OTHER = {A: B, B: A, TIE: TIE}


def rows(source: str) -> Iterator[Row | BadRow]:
    """One row per question, turn and two models, `votes` from judge to vote; model_a is the first by its name."""
    yield from merge_rows(read_rows(source), key=_key, merge=_merge)


def _key(values: Mapping[str, Any]) -> Hashable:
    models = sorted(text(values, name) for name in ("model_a", "model_b"))
    if models[0] == models[1]:
        raise FieldError("model_b", f"both models are {models[0]}")
    turn = get(values, "turn")
    if isinstance(turn, bool) or turn not in (1, 2):
        raise FieldError("turn", f"expected 1 or 2, got {shorten(turn)}")
    return str(get(values, "question_id")), turn, *models


def _merge(found: Sequence[Row]) -> Row | BadRow:
    votes: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for row in found:
        values = row.values
        swapped = values["model_a"] > values["model_b"]
        first, second = ("b", "a") if swapped else ("a", "b")
        try:
            winner = text(values, "winner")
            # "tie", and "tie (bothbad)" or "tie (inconsistent)".
            vote = TIE if winner.startswith("tie") else {"model_a": A, "model_b": B}.get(winner)
            if vote is None:
                raise FieldError("winner", f"expected model_a, model_b or tie, got {shorten(winner)}")
            judge = _name(values)
            if judge in votes:
                raise FieldError("judge", f"{judge} has voted on this question, turn and pair of models before")
            votes[judge] = OTHER[vote] if swapped else vote
            merged = merged or {
                **{name: values[name] for name in ("question_id", "turn")},
                "model_a": values[f"model_{first}"],
                "model_b": values[f"model_{second}"],
                "conversation_a": _turns(values, f"conversation_{first}"),
                "conversation_b": _turns(values, f"conversation_{second}"),
            }
        except FieldError as error:
            return BadRow(place=row.place, column=error.column, reason=str(error))
    return Row(place=found[0].place, values={**merged, "votes": votes})


def _name(values: Mapping[str, Any]) -> str:
    judge = get(values, "judge")
    return "/".join(map(str, judge)) if isinstance(judge, list) else str(judge)


def _turns(values: Mapping[str, Any], column: str) -> list[str]:
    """What user and assistant said in turn, up to the turn that is judged."""
    said = get(values, column)
    length = 2 * values["turn"]
    if not isinstance(said, list) or len(said) < length or not all(isinstance(turn, Mapping) for turn in said):
        raise FieldError(column, f"expected {length} messages or more for turn {values['turn']}, got {shorten(said)}")
    for number, (turn, role) in enumerate(zip(said[:length], ("user", "assistant") * 2)):
        if turn.get("role") != role or not isinstance(turn.get("content"), str):
            raise FieldError(f"{column}.{number}", f"expected a message of the {role}, got {shorten(turn)}")
    return [turn["content"] for turn in said[:length]]


def read(values: Mapping[str, Any]) -> Pair:
    (question, *rest), (other, *rest_b) = values["conversation_a"], values["conversation_b"]
    if question != other or rest[1:2] != rest_b[1:2]:
        raise FieldError("conversation_b", "its questions are not those of conversation_a")
    return Pair(
        id=f"{values['question_id']}/{values['turn']}/{values['model_a']}/{values['model_b']}",
        instruction=question,
        response_a=_conversation(rest),
        response_b=_conversation(rest_b),
        votes=values["votes"],
        group=f"mt_bench_human:{values['question_id']}",
        subset=f"turn-{values['turn']}",
        meta={name: values[name] for name in ("question_id", "turn", "model_a", "model_b")},
    )


def _conversation(rest: Sequence[str]) -> str:
    if len(rest) == 1:
        return rest[0]
    answer, question, last = rest
    return f"{answer}\n\nUser: {question}\n\nAssistant: {last}"


BUILDER = PairBuilder(
    name="mt_bench_human",
    about="MT-Bench's human votes on pairs of answers, of both turns",
    read=read,
    rows=rows,
    sources=("lmsys/mt_bench_human_judgments@human",),
)
