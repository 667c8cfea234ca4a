"""Feedback that a model wrote, completed with the human score: a judgement to learn where nobody wrote one.

TRACT's second stage (Chiang et al., 2025) learns such judgements, and a warm-up on labels alone begins with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from real_openrlhf.algo.bound_scale import decode
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.data.given import encode_response
from real_openrlhf.data.rounding import written_label
from real_openrlhf.data.template import PromptError
from real_openrlhf.data.verdict import cut, until_last_sentence

# How a completed feedback ended.
ANCHOR, END, LENGTH, EMPTY = "anchor", "end", "length", "empty"


@dataclass(frozen=True, kw_only=True)
class Completed:
    """response_ids: feedback, anchor, score, end of text. feedback: its text. ended: why the feedback ends there:

    anchor   the model wrote the text before the score
    end      it ended its response, or wrote a verdict of another form, which is cut off
    length   it was cut at the longest response, and goes back to its last whole sentence
    empty    nothing was left: the score alone is learned
    """

    response_ids: tuple[int, ...]
    feedback: str
    ended: str


def tail_tokens(reader: ScoreReader, tokenizer: Any) -> int:
    """The most tokens that anchor, score and end of text add to a feedback."""
    anchor = reader.bound.anchors[0].text
    return max(len(encode_response(tokenizer, f" {anchor}{label}")) for label in reader.bound.scale.labels)


def complete(
    reader: ScoreReader,
    tokenizer: Any,
    response_ids: Sequence[int],
    *,
    finished: bool,
    label: float,
    rounding: str,
    rng: random.Random,
) -> Completed:
    """response_ids [T]: as sampled. finished: it ended by itself. label: the human score.

    Where the model wrote the anchor, its own tokens up to the score are kept as they are; elsewhere the text is cut and
    tokenised again.
    """
    scale = reader.bound.scale
    written = written_label(label, scale, rounding, rng)
    reading = reader.read(response_ids)
    if reading.position is not None and reading.anchor_index is not None:
        anchor = reader.bound.anchors[reading.anchor_index]
        before = list(response_ids[: reading.position])
        ids = (*before, *anchor.labels[scale.labels.index(written)], tokenizer.eos_token_id)
        text = decode(tokenizer, before)
        feedback = text[: text.rindex(anchor.prefix)].strip()
        return Completed(response_ids=ids, feedback=feedback, ended=ANCHOR if feedback else EMPTY)
    text = tokenizer.decode(list(response_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    feedback, ended = cut(text).feedback, END
    if not finished and feedback == text.strip():
        feedback, ended = until_last_sentence(feedback), LENGTH
    anchor_text = reader.bound.anchors[0].text
    try:
        ids = encode_response(tokenizer, f"{feedback} {anchor_text}{written}")
    except PromptError:
        # A sampled token that no text has.
        feedback = ""
    if not feedback:
        ids, ended = encode_response(tokenizer, f"{anchor_text}{written}"), EMPTY
    return Completed(response_ids=ids, feedback=feedback, ended=ended)
