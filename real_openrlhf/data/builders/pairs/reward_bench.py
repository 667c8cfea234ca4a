"""RewardBench, and other preference sets of its form: a prompt with a chosen and a rejected response.

The form is that of allenai/reward-bench's data set on the hub (prompt, chosen, rejected, subset, id), which its
`rewardbench/utils.py` (`load_eval_dataset`) reads. `chosen` and `rejected` may also be whole conversations, as in the
preference sets that it reads beside (`load_and_process_dataset`): lists of messages with one prompt before the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import FieldError, get, group_of, optional_text, question_of, text
from real_openrlhf.data.builders.pairs.base import Pair, PairBuilder
from real_openrlhf.data.preferences import A
from real_openrlhf.data.row import shorten


def read(values: Mapping[str, Any]) -> Pair:
    """The chosen response is `response_a`, in every pair."""
    if isinstance(get(values, "chosen"), str):
        prompt = _prompt(get(values, "prompt"), "prompt")
        chosen, rejected = (text(values, name, blank=True) for name in ("chosen", "rejected"))
    else:
        (prompt, chosen), (other, rejected) = (_split(values, name) for name in ("chosen", "rejected"))
        if prompt != other:
            raise FieldError("rejected", "its messages before the last are not those of chosen")
    if chosen == rejected:
        raise FieldError("rejected", "it is the same text as chosen")
    pair = values.get("id")
    return Pair(
        id=None if pair is None else str(pair),
        instruction=prompt,
        response_a=chosen,
        response_b=rejected,
        votes={"chosen": A},
        group=f"reward_bench:{group_of(question_of(prompt))}",
        subset=optional_text(values, "subset"),
        meta={key: values[key] for key in ("chosen_model", "rejected_model") if values.get(key) is not None},
    )


def _split(values: Mapping[str, Any], column: str) -> tuple[str, str]:
    """(the messages before the last as one text, the last one, which is the assistant's)."""
    said = get(values, column)
    if isinstance(said, list) and said and all(isinstance(turn, str) for turn in said):
        raise FieldError(column, f"holds {len(said)} responses; pairs have one (RewardBench 2 compares four)")
    _messages(said, column)
    if len(said) < 2 or said[-1]["role"] != "assistant":
        raise FieldError(column, f"expected a prompt and then a message of the assistant, got {shorten(said)}")
    return _prompt(said[:-1], column), said[-1]["content"]


def _prompt(said: Any, column: str) -> str:
    """One user's message as it is; several as a conversation."""
    if isinstance(said, str) and said.strip():
        return said
    _messages(said, column)
    if len(said) == 1 and said[0]["role"] == "user":
        return str(said[0]["content"])
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in said)


def _messages(said: Any, column: str) -> None:
    good = isinstance(said, list) and said and all(isinstance(turn, Mapping) for turn in said)
    if not good or not all(isinstance(turn.get(key), str) for turn in said for key in ("role", "content")):
        raise FieldError(column, f"expected text, or messages with 'role' and 'content', got {shorten(said)}")


BUILDER = PairBuilder(
    name="reward_bench",
    about="RewardBench, or any file of its form: prompt, chosen, rejected and perhaps subset",
    read=read,
    sources=("allenai/reward-bench@filtered",),
)
