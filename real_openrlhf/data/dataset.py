"""A judge's data set: prompts with human scores, every row checked, nothing imputed."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TypeVar

from real_openrlhf.algo.score_scale import ScaleError, ScoreScale
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import BadRow, DataError, Row, lookup, shorten
from real_openrlhf.data.sources import read_rows
from real_openrlhf.data.template import ChatTokenizer, PromptError, PromptTemplate

logger = logging.getLogger(__name__)
LISTED = 10
# The column of the response that is judged, in files that `real_openrlhf.data` builds.
JUDGED = "judged.response"
_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True)
class JudgeDataset:
    """
    source   as given
    prompts  in the source's order
    skipped  bad rows that were left out, if that was allowed
    sha256   of the prompts' token ids and labels, in order
    """

    source: str
    prompts: tuple[Prompt, ...]
    skipped: tuple[BadRow, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        input_key: str,
        label_key: str,
        scale: ScoreScale,
        tokenizer: ChatTokenizer,
        template: PromptTemplate,
        max_prompt_tokens: int,
        max_samples: int | None = None,
        seed: int = 0,
        skip_bad_rows: bool = False,
        judged_key: str | None = None,
    ) -> JudgeDataset:
        """Read, check and tokenise.

        input_key, label_key: columns; a dotted name reaches into nested objects. judged_key: that of the response that
        is judged, for watches; None: `JUDGED`, in rows that have it. max_prompt_tokens: longer prompts are
        bad rows (never cut). max_samples: that many good rows, drawn by the seed from the whole source, in its order; a
        larger sample of the same seed holds the smaller one. Prompt.row is the row's index in the source, counted from
        0, bad rows included.

        Raises DataError at the first bad row that was drawn (file, row, column, reason); with skip_bad_rows only when
        no row is left, or when a file as a whole cannot be read.
        """
        if max_prompt_tokens < 1:
            raise DataError(
                f"{max_prompt_tokens} tokens are left for the prompt; raise --data.max_len or lower "
                "--rollout.max_new_tokens"
            )
        template.check(tokenizer)

        def read(row: Row, index: int) -> Prompt | BadRow:
            prompt = read_prompt(row, index, input_key, label_key, scale, tokenizer, template, max_prompt_tokens)
            return prompt if isinstance(prompt, BadRow) else with_judged(prompt, row, judged_key, tokenizer)

        prompts, skipped = load_rows(source, read, max_samples=max_samples, seed=seed, skip_bad_rows=skip_bad_rows)
        return cls(source=source, prompts=tuple(prompts), skipped=tuple(skipped), sha256=content_hash(prompts))


def load_rows(
    source: str,
    read: Callable[[Row, int], _Read | BadRow],
    *,
    max_samples: int | None,
    seed: int,
    skip_bad_rows: bool,
) -> tuple[list[_Read], list[BadRow]]:
    """(the good rows, the bad ones that were left out and logged), both in the source's order.

    read: (row, its index in the source) -> what it holds, or what is wrong with it. max_samples, seed, errors: see
    `JudgeDataset.load`.
    """
    if max_samples is not None and max_samples < 1:
        raise DataError(f"--data.max_samples must be at least 1, got {max_samples}")
    good: dict[int, _Read] = {}
    bad: dict[int, BadRow] = {}
    rows = read_rows(source)
    for index, row in enumerate(rows) if max_samples is None else _shuffled(list(rows), max_samples, seed):
        found = read(row, index) if isinstance(row, Row) else row
        if not isinstance(found, BadRow):
            good[index] = found
            if len(good) == max_samples:
                break
        elif skip_bad_rows:
            bad[index] = found
        else:
            raise DataError(f"{found}. Repair the row, or pass --data.skip_bad_rows to leave such rows out.")
    skipped = [bad[index] for index in sorted(bad)]
    _report(source, len(good), skipped)
    return [good[index] for index in sorted(good)], skipped


def _shuffled(rows: Sequence[Row | BadRow], n: int, seed: int) -> Iterable[tuple[int, Row | BadRow]]:
    """All rows with their indices, in an order of which any beginning is a sample; in their own where n is all."""
    order = range(len(rows)) if len(rows) <= n else random.Random(seed).sample(range(len(rows)), len(rows))
    return ((index, rows[index]) for index in order)


def content_hash(prompts: Sequence[Prompt]) -> str:
    """sha256 over every prompt's token ids and label, in order; text and row do not count."""
    digest = hashlib.sha256()
    for prompt in prompts:
        ids = prompt.token_ids
        digest.update(struct.pack(f"<q{len(ids)}qd", len(ids), *ids, prompt.label))
    return digest.hexdigest()


def read_label(value: object, scale: ScoreScale) -> float:
    """A label on the scale, from a number or a numeric string. For anything else ValueError, which names the scale."""
    on = f"a label is a number from {scale.values[0]:g} to {scale.values[-1]:g} (scale {scale})"
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"the label is missing; {on}")
    wrong = f"{shorten(value)} is not a number; {on}"
    # In Python, bool is an int, and float("1_0") is 10.
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)) or "_" in str(value):
        raise ValueError(wrong)
    try:
        label = float(value)
    except (ValueError, OverflowError):
        raise ValueError(wrong) from None
    if not math.isfinite(label):
        raise ValueError(f"{shorten(value)} is not a finite number; {on}")
    try:
        return scale.target(label).value
    except ScaleError as error:
        raise ValueError(f"{error}; {on}") from error


def read_prompt(
    row: Row,
    index: int,
    input_key: str,
    label_key: str,
    scale: ScoreScale,
    tokenizer: ChatTokenizer,
    template: PromptTemplate,
    max_prompt_tokens: int,
) -> Prompt | BadRow:
    """The prompt of a row, or what is wrong with it. DataError for a template that cannot be used at all."""
    column = input_key
    try:
        raw = lookup(row.values, input_key)
        column = label_key
        label = read_label(lookup(row.values, label_key), scale)
        column = input_key
        text, token_ids = template.render(tokenizer, raw)
    except KeyError as error:
        return BadRow(place=row.place, column=column, reason=str(error.args[0]))
    except PromptError as error:
        return BadRow(place=row.place, column=column, reason=str(error))
    except DataError:
        raise  # the template is wrong, not this row
    except ValueError as error:
        return BadRow(place=row.place, column=column, reason=str(error))
    if len(token_ids) > max_prompt_tokens:
        reason = (
            f"the prompt has {len(token_ids)} tokens, but {max_prompt_tokens} are left for it; raise --data.max_len or "
            "lower --rollout.max_new_tokens"
        )
        return BadRow(place=row.place, column=input_key, reason=reason)
    return Prompt(token_ids=token_ids, label=label, row=index, text=text)


def with_judged(prompt: Prompt, row: Row, key: str | None, tokenizer: ChatTokenizer) -> Prompt | BadRow:
    """The prompt with the tokens of the response that is judged. Without a key, a row may lack it."""
    try:
        text = lookup(row.values, key or JUDGED)
    except KeyError as error:
        return prompt if key is None else BadRow(place=row.place, column=key, reason=str(error.args[0]))
    if not isinstance(text, str):
        reason = f"the response that is judged is text, got {shorten(text)}"
        return prompt if key is None else BadRow(place=row.place, column=key, reason=reason)
    return replace(prompt, judged_ids=tuple(tokenizer.encode(text, add_special_tokens=False)))


def _report(source: str, kept: int, skipped: list[BadRow]) -> None:
    """Log the rows that were left out; DataError when none was kept."""
    if not skipped:
        return
    shown = "\n".join(f"  {bad}" for bad in skipped[:LISTED])
    more = f"\n  and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
    if not kept:
        raise DataError(f"{source}: no usable row is left; all {len(skipped)} are bad:\n{shown}{more}")
    logger.warning("%s: skipped %d bad rows, kept %d:\n%s%s", source, len(skipped), kept, shown, more)
