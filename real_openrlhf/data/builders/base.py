"""What a builder is: a function that turns one row of a source into one judged item, and its data set's defaults."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.dataset import read_label
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.row import BadRow, Row, lookup, shorten
from real_openrlhf.data.sources import read_rows


class FieldError(ValueError):
    """A field of a row cannot be used; the caller adds file and row."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(reason)
        self.column = column


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a judge's prompt; see `real_openrlhf.data.judge_prompt`."""

    instruction: str
    response: str
    reference: str | None = None
    rubric: Rubric | str | None = None
    context: str | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One judged response.

    id         the data set's own id of the row; None: the row's number in its file is used
    label      the score, on the scale
    group      rows of one group (a question, a pair) are in the same split
    whole      the prompt as the source has it (text or chat messages), if it has one
    parts      values for a template, if the source has them, or if they were found in `whole`
    split      the source's own split, if it names one
    critique   text of the judgement that gave the label, with its verdict; None: there is none that fits the label
    n          number of judgements averaged into the label; feedback is used only if it is 1
    meta       the rest of the source's ids and categories
    aspect     what was rated, where the data set has several ratings of one response
    ratings    rater -> score, where the label is the mean of several people's scores
    rng        random numbers of this row alone, so that it does not depend on its place
    """

    id: str | None = None
    label: float
    group: str
    whole: object = None
    parts: Parts | None = None
    split: str | None = None
    critique: str | None = None
    n: int = 1
    meta: Mapping[str, Any] = field(default_factory=dict)
    aspect: str | None = None
    ratings: Mapping[str, float] = field(default_factory=dict)
    rng: random.Random | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line tells a builder. label_key: column of the score; None: the data set's own. columns: the
    field map of the generic builder. aspects: those to build, of a data set that has several."""

    scale: ScoreScale
    seed: int = 0
    label_key: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    aspects: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Builder:
    """A data set.

    about       one line for --help
    read        one row to an item, or to several where it holds several judged responses or ratings; raises
                FieldError, or KeyError from `lookup`
    rows        the rows of a source; `read_rows` unless the data set has a form of its own
    scale       of its labels; None: has to be given
    template    of its prompts unless another is asked for; None: has to be given
    sources     where it is read from unless told otherwise: SOURCE or SPLIT=SOURCE
    fractions   of the groups per split, where neither source nor row names one
    shuffle     rows stand in an order that means something, so that the first N would not stand for all
    unique      one row per group; the others repeat it
    critiques   rows come with feedback that a warm-up can be made of
    labels_alone   rows without feedback go into a warm-up too: a model writes it there
    aspects     what is rated to the scale of its ratings, where there are several ratings of one response
    check       looks at the options before any row is read; raises ValueError
    """

    name: str
    about: str
    read: Callable[[Mapping[str, Any], Options], Item | list[Item]]
    scale: str | None
    template: str | None
    sources: Sequence[str] = ()
    fractions: Mapping[str, float] = field(default_factory=lambda: {"test": 1.0})
    shuffle: bool = False
    unique: bool = False
    critiques: bool = False
    labels_alone: bool = False
    aspects: Mapping[str, str] = field(default_factory=dict)
    rows: Callable[[str], Iterator[Row | BadRow]] = read_rows
    check: Callable[[Options], None] | None = None


def get(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column that must exist; a dotted name reaches into objects."""
    try:
        return lookup(values, column)
    except KeyError as error:
        raise FieldError(column, str(error.args[0])) from None


def text(values: Mapping[str, Any], column: str, *, blank: bool = False) -> str:
    """The text of a column, unchanged. blank: it may be empty."""
    value = get(values, column)
    if not isinstance(value, str) or not (blank or value.strip()):
        raise FieldError(column, f"expected text, got {shorten(value)}")
    return value


def optional_text(values: Mapping[str, Any], column: str) -> str | None:
    """The text of a column; None when the column is missing, null or blank."""
    value = values.get(column)
    if value is not None and not isinstance(value, str):
        raise FieldError(column, f"expected text or nothing, got {shorten(value)}")
    return value if value and value.strip() else None


def label(values: Mapping[str, Any], column: str, scale: ScoreScale) -> float:
    """The score of a column, on the scale."""
    try:
        return read_label(get(values, column), scale)
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(column, str(error)) from error


def mean_label(values: Mapping[str, Any], column: str, scale: ScoreScale) -> tuple[float, int]:
    """The mean of a list of scores, or a single score, and their number. Each must be on the scale."""
    value = get(values, column)
    scores = value if isinstance(value, (list, tuple)) else [value]
    if not scores:
        raise FieldError(column, "the list of scores is empty")
    try:
        numbers = [read_label(score, scale) for score in scores]
    except ValueError as error:
        raise FieldError(column, str(error)) from error
    return sum(numbers) / len(numbers), len(numbers)


def ratings(scores: Mapping[str, object], column: str, scale: ScoreScale) -> dict[str, float]:
    """Rater -> score, each on the scale. The label is their mean: `mean`."""
    if not scores:
        raise FieldError(column, "there is no rating")
    found = {}
    for rater, score in scores.items():
        try:
            found[rater] = read_label(score, scale)
        except ValueError as error:
            raise FieldError(column, f"{rater}: {error}") from error
    return found


def listed_ratings(
    values: Mapping[str, Any], column: str, scale: ScoreScale, raters: Sequence[str] | None = None
) -> dict[str, float]:
    """The same from a list of scores. raters: in its order; None: they have no names but their places."""
    value = get(values, column)
    if not isinstance(value, (list, tuple)):
        raise FieldError(column, f"expected a list of scores, one per rater, got {shorten(value)}")
    names = [f"rater {number}" for number in range(1, len(value) + 1)] if raters is None else raters
    if len(names) != len(value):
        raise FieldError(column, f"{len(value)} scores, but there are {len(names)} raters: {', '.join(names)}")
    return ratings(dict(zip(names, value)), column, scale)


def mean(found: Mapping[str, float]) -> float:
    """Of ratings: the label."""
    return fmean(found.values())


def group_of(*texts: str) -> str:
    """A group name that is the same for the same texts, whatever their case and spacing.

    >>> group_of("Say  hello.") == group_of("say hello.")
    True
    """
    plain = "\n".join(" ".join(part.casefold().split()) for part in texts)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# How the turns of a conversation are marked where it is one text: "User:", "### User:", "**User:**", "[User]:",
# "<|user|>", and chat templates: Qwen, Gemma and Llama 3 (such as "<|im_start|>user"), Llama 2 ("[INST]").
_BEFORE = r"[ \t#*\[<|]*(?:(?:im_start|start_header_id)\|>|start_of_turn>)?[ \t]*"
_AFTER = r"(?:<\|end_header_id\|>|[ \t]*[:>\]|*]+|[ \t]*$)"
_USER = re.compile(rf"\s*(?:<\|begin_of_text\|>|<bos>)?{_BEFORE}(?:user|human){_AFTER}", re.IGNORECASE | re.MULTILINE)
_ASSISTANT = re.compile(
    rf"(?:^|(?<=\|>)){_BEFORE}(?:assistant|ai|model)(?: [A-Z0-9])?{_AFTER}", re.IGNORECASE | re.MULTILINE
)
_LLAMA = re.compile(r"\s*(?:<s>)?\s*\[INST\](.+?)\[/INST\]", re.DOTALL)
_TURN_END = re.compile(r"<\|?(?:im_end|eot_id|end_of_turn|end)\|?>\s*\Z")


def question_of(instruction: str) -> str:
    """What was asked. Of a conversation only the first turn, since later turns contain the judged model's answers.

    >>> question_of("User: Write about rain.\\n\\nAssistant: It pours.\\n\\nUser: Shorter.\\n\\nAssistant: ")
    'Write about rain.'
    """
    llama, user = _LLAMA.match(instruction), _USER.match(instruction)
    if llama:
        return llama[1].strip()
    answer = _ASSISTANT.search(instruction, user.end()) if user else None
    first = _TURN_END.sub("", instruction[user.end() : answer.start()]).strip() if user and answer else ""
    return first or instruction


def rubric_of(values: Mapping[str, Any], criteria: str, descriptions: Mapping[str, str]) -> Rubric:
    """A rubric from columns. criteria: its column. descriptions: score -> the column of its description."""
    return Rubric(
        criteria=text(values, criteria),
        descriptions={score: text(values, name) for score, name in descriptions.items()},
    )
