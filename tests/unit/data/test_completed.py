from __future__ import annotations

import random
from typing import Any

import pytest

from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.completed import Completed, complete, tail_tokens
from real_openrlhf.data.verdict import until_last_sentence
from tests.helpers.tokenizers import word_tokenizer

ANCHOR = "So the overall score is "
TOKENIZER = word_tokenizer()
READER = ScoreReader.build(
    bind_scale(ScoreScale.parse("1-5"), TOKENIZER, [ANCHOR]), TOKENIZER, {TOKENIZER.eos_token_id}
)


def completed(text: str, *, finished: bool = True, label: float = 4, **more: Any) -> Completed:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    settings: dict[str, Any] = {"rounding": "nearest", "rng": random.Random(0), **more}
    return complete(READER, TOKENIZER, ids, finished=finished, label=label, **settings)


def words(found: Completed) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(list(found.response_ids)))


TAIL = "So the overall score is 4 <eos>"


@pytest.mark.parametrize(
    ("text", "finished", "feedback", "ended"),
    [
        # The score that the model wrote gives way to the human one; what follows it goes.
        (f"good text . {ANCHOR}2<eos>", True, "good text .", "anchor"),
        (f"good text . {ANCHOR}2 . bad", False, "good text .", "anchor"),
        (f"good . {ANCHOR}9", False, "good .", "anchor"),
        # Two anchors: the last one is where the score is read.
        (f"good {ANCHOR}1 bad {ANCHOR}2<eos>", True, f"good {ANCHOR}1 bad", "anchor"),
        (f"{ANCHOR}2<eos>", True, "", "empty"),
        ("good text .<eos>", True, "good text .", "end"),
        # A verdict of another form says another score: it is cut off.
        ("good text . score : 2<eos>", True, "good text .", "end"),
        ("good text . score : 2 . bad", False, "good text .", "end"),
        ("good text . bad text", False, "good text .", "length"),
        ("good text bad", False, "good text bad", "length"),
        ("<eos>", True, "", "empty"),
    ],
)
def test_the_human_score_completes_the_feedback(text: str, finished: bool, feedback: str, ended: str) -> None:
    found = completed(text, finished=finished)
    assert (found.feedback, found.ended) == (feedback.strip(), ended)
    assert words(found) == f"{feedback} {TAIL}".strip()
    assert READER.read(found.response_ids).label_index == 3


def test_sampled_tokens_before_the_score_are_kept_as_they_are() -> None:
    ids = [*TOKENIZER.encode("good good", add_special_tokens=False), 1, *TOKENIZER.encode(f"{ANCHOR}2")]
    found = complete(READER, TOKENIZER, ids, finished=True, label=4, rounding="nearest", rng=random.Random(0))
    assert found.response_ids[: len(ids) - 1] == tuple(ids[:-1])


def test_labels_between_two_scores_are_rounded_with_the_share_of_each() -> None:
    found = [completed("good .", label=3.25, rounding="stochastic", rng=random.Random(i)) for i in range(400)]
    written = [READER.read(item.response_ids).label_index for item in found]
    assert set(written) == {2, 3} and abs(written.count(3) / 400 - 0.25) < 0.06


def test_room_for_the_tail() -> None:
    assert tail_tokens(READER, TOKENIZER) == 7


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Clear. But it", "Clear."),
        ("No end", "No end"),
        ("One. Two.", "One. Two."),
        ("好。但", "好。"),
        ("3.5 is", "3.5 is"),
    ],
)
def test_the_last_whole_sentence(text: str, whole: str) -> None:
    assert until_last_sentence(text) == whole
