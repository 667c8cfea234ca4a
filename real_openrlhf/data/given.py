"""Given judgements: prompts with the response to learn, every row checked, nothing imputed."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.algo.bound_scale import BoundScale, decode
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import Group, Rollout, ScoreReading
from real_openrlhf.data.dataset import JudgeDataset, load_rows, read_prompt
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import BadRow, DataError, Row, lookup, shorten
from real_openrlhf.data.template import PromptError, PromptTemplate


@dataclass(frozen=True, kw_only=True)
class GivenRow:
    """One judgement. response_ids: feedback, anchor, score and the end of text; None where there is no response."""

    prompt: Prompt
    response_ids: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class GivenDataset:
    """dataset: prompts and labels, as REAL reads them. responses: by `Prompt.row`. without: rows that have none."""

    dataset: JudgeDataset
    responses: Mapping[int, tuple[int, ...]]
    without: tuple[int, ...]

    @classmethod
    def load(
        cls,
        source: str,
        *,
        input_key: str,
        label_key: str,
        response_key: str,
        tokenizer: Any,
        template: PromptTemplate,
        reader: ScoreReader,
        max_len: int,
        max_prompt_tokens: int,
        response_may_lack: bool = False,
        max_samples: int | None = None,
        seed: int = 0,
        skip_bad_rows: bool = False,
    ) -> GivenDataset:
        """Read, check and tokenise.

        max_len: tokens of prompt and response together; longer rows are bad ones, nothing is cut. max_prompt_tokens: of
        rows without a response, whose feedback is still to be written. response_may_lack: such rows are kept.
        max_samples, seed: as `JudgeDataset.load` draws them.

        Raises DataError at the first bad row (file, row, column, reason); with skip_bad_rows only when no row is left.
        A response is bad when it writes no score of the scale where the score is read, or another one than the labels
        next to the human score.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end of text; name one as eos_token in its tokenizer_config.json")
        template.check(tokenizer)

        def read(row: Row, index: int) -> GivenRow | BadRow:
            return _given(
                row,
                index,
                keys=(input_key, label_key, response_key),
                tokenizer=tokenizer,
                template=template,
                reader=reader,
                max_len=max_len,
                max_prompt_tokens=max_prompt_tokens,
                may_lack=response_may_lack,
            )

        rows, skipped = load_rows(source, read, max_samples=max_samples, seed=seed, skip_bad_rows=skip_bad_rows)
        prompts = tuple(row.prompt for row in rows)
        return cls(
            dataset=JudgeDataset(source=source, prompts=prompts, skipped=tuple(skipped), sha256=_sha256(rows)),
            responses={row.prompt.row: row.response_ids for row in rows if row.response_ids is not None},
            without=tuple(row.prompt.row for row in rows if row.response_ids is None),
        )


def with_responses(given: GivenDataset, responses: Mapping[int, tuple[int, ...]]) -> GivenDataset:
    """The same rows with these responses by row, in place of none or of those they had."""
    new = {**given.responses, **responses}
    prompts = given.dataset.prompts
    rows = [GivenRow(prompt=prompt, response_ids=new.get(prompt.row)) for prompt in prompts]
    return GivenDataset(
        dataset=replace(given.dataset, sha256=_sha256(rows)),
        responses=new,
        without=tuple(row.prompt.row for row in rows if row.response_ids is None),
    )


def given_group(prompt: Prompt, response_ids: Sequence[int], reader: ScoreReader) -> Group:
    """A group of one response that was not sampled: what the policy learns in a warm-up.

    Its log-probs are unknown: None, and NaN at the score rows.
    """
    reading = reader.read(response_ids)
    rows = _score_rows(reading, response_ids, reader.bound)
    rollout = Rollout(
        token_ids=_tensor(response_ids),
        logprobs=None,
        reading=reading,
        score_rows=rows,
        score_logprobs=torch.full(rows.token_ids.shape, math.nan),
        finish_reason="stop",
    )
    return Group(
        prompt_ids=_tensor(prompt.token_ids), label=prompt.label, rollouts=(rollout,), row=prompt.row, weight_version=0
    )


def encode_response(tokenizer: Any, response: object) -> tuple[int, ...]:
    """The response's ids and one end of text. Raises PromptError for what is no text, or no text to this tokenizer.

    It is tokenised by itself, not joined to the prompt's text: in training the model continues the
    prompt's ids, and an id that straddles the two could never be sampled.
    """
    if not isinstance(response, str) or not response.strip():
        raise PromptError(f"a response is text, not {shorten(response)}")
    ids = list(tokenizer.encode(response, add_special_tokens=False))
    end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    if unknown is not None and unknown != end and unknown in ids:
        raise PromptError(f"the tokenizer has no token for a part of {shorten(response)}")
    return tuple(ids if ids[-1:] == [end] else [*ids, end])


def _given(
    row: Row,
    index: int,
    *,
    keys: tuple[str, str, str],
    tokenizer: Any,
    template: PromptTemplate,
    reader: ScoreReader,
    max_len: int,
    max_prompt_tokens: int,
    may_lack: bool,
) -> GivenRow | BadRow:
    input_key, label_key, response_key = keys
    scale = reader.bound.scale
    try:
        response = lookup(row.values, response_key)
    except KeyError as error:
        if not may_lack:
            return BadRow(place=row.place, column=response_key, reason=f"{error.args[0]}. {_SAMPLE}")
        response = None
    lacks = response is None or (isinstance(response, str) and not response.strip())
    if lacks and not may_lack:
        return BadRow(place=row.place, column=response_key, reason=f"there is no response. {_SAMPLE}")
    longest = max_prompt_tokens if lacks else max_len - 1
    prompt = read_prompt(row, index, input_key, label_key, scale, tokenizer, template, longest)
    if isinstance(prompt, BadRow) or lacks:
        return prompt if isinstance(prompt, BadRow) else GivenRow(prompt=prompt, response_ids=None)
    try:
        ids = encode_response(tokenizer, response)
    except PromptError as error:
        return BadRow(place=row.place, column=response_key, reason=str(error))
    reason = _wrong_score(reader, ids, prompt.label)
    if reason is None and len(prompt.token_ids) + len(ids) > max_len:
        reason = (
            f"prompt and response have {len(prompt.token_ids) + len(ids)} tokens; raise --data.max_len {max_len} or "
            "shorten the row"
        )
    if reason is not None:
        return BadRow(place=row.place, column=response_key, reason=reason)
    return GivenRow(prompt=prompt, response_ids=ids)


_SAMPLE = "With --warmup.feedback missing the model writes feedback for such rows, and the label is put after it"


def _wrong_score(reader: ScoreReader, ids: Sequence[int], label: float) -> str | None:
    """Why the score that a response writes is not the human one; None where it is."""
    scale = reader.bound.scale
    reading = reader.read(ids)
    text = shorten(decode(reader.tokenizer, ids)[-60:])
    if reading.label_index is None:
        anchors = " or ".join(repr(anchor.text) for anchor in reader.bound.anchors)
        return (
            f"its end {text} has no score of the scale {scale} after {anchors} ({reading.reason}); --real.anchor names "
            "the text before the score, --real.scale the labels"
        )
    target = scale.target(label)
    beside = {target.low, target.high} if 0 < target.weight < 1 else set(target.nearest)
    if reading.label_index not in beside:
        return f"its end {text} says {scale.labels[reading.label_index]}, but the label is {label:g}"
    return None


def _score_rows(reading: ScoreReading, ids: Sequence[int], bound: BoundScale) -> ScoreRows:
    if reading.position is None or reading.anchor_index is None:
        return ScoreRows.empty(len(bound.scale.labels))
    return ScoreRows.of(bound.anchors[reading.anchor_index].trie, ids, reading.position)


def _tensor(ids: Sequence[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64)


def _sha256(rows: Sequence[GivenRow]) -> str:
    """Over prompts, labels and responses, in order."""
    digest = hashlib.sha256()
    for row in rows:
        ids, response = row.prompt.token_ids, row.response_ids or ()
        digest.update(struct.pack(f"<q{len(ids)}qd", len(ids), *ids, row.prompt.label))
        digest.update(struct.pack(f"<q{len(response)}q", len(response), *response))
    return digest.hexdigest()
