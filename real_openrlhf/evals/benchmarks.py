"""Named benchmarks: finds their files and reads the rows as prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.paths import expand
from real_openrlhf.data.dataset import JudgeDataset
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import Row, lookup, nearest
from real_openrlhf.data.sources import read_rows
from real_openrlhf.data.template import ChatTokenizer, PromptTemplate
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.raters import raters_of
from real_openrlhf.evals.results import AVERAGE, READINGS
from real_openrlhf.evals.tables import PAPER_NAMES

GROUP = "group"
# The first character is a letter or digit of any script.
_NAME = re.compile(r"[^\W_][\w.-]*")
# A comma separates only if a further name= follows, so paths may have commas.
_COMMA = re.compile(r",(?=[^\W_][\w.-]*=)")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """prompts in the file's order; groups: per prompt, what rows share that are not independent. sha256: of the
    prompts' ids and labels. pair_mode: how pairs of responses are judged (`judge.pairs.MODES`), whose prompts come two
    by two (`evals.pairs`); None: no pairs. raters: how the people behind the labels agree (`evals.raters`), by
    aspect."""

    name: str
    source: str
    prompts: tuple[Prompt, ...]
    groups: tuple[str, ...]
    sha256: str
    pair_mode: str | None = None
    raters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def parse_benchmarks(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Name -> source, from "name=path" (several, separated by commas) or from a path alone.

    A path alone is named by its file: blanks and other characters that a name cannot have become _.

    Raises EvaluationError for names that occur twice or cannot be part of a metric's name.

    >>> parse_benchmarks(["flask=/data/a.parquet,mt_bench=/data/b.parquet"], "--benchmark")
    {'flask': '/data/a.parquet', 'mt_bench': '/data/b.parquet'}
    """
    found: dict[str, str] = {}
    for item in (part for text in texts for part in ([text] if _there(text) else _COMMA.split(text))):
        name, equals, source = item.partition("=")
        if _there(item) or not equals or not _NAME.fullmatch(name):
            name, source = _name_of(item), item
        if not source.strip():
            raise EvaluationError(f"{flag}: {item!r} is not a benchmark; write NAME=PATH, or the path of a file")
        if not _NAME.fullmatch(name):
            raise EvaluationError(f"{flag}: no name can be made from {item!r}; write NAME=PATH")
        source = expand(source)
        if name in (AVERAGE, *READINGS):
            raise EvaluationError(f"{flag}: a benchmark cannot be named {name!r}: results have that name already")
        if name in found:
            raise EvaluationError(f"{flag}: two benchmarks are named {name!r}; write NAME=PATH with different names")
        if source == name and not Path(source).exists():
            known = nearest(name, list(PAPER_NAMES))
            raise EvaluationError(
                f"{flag}: there is no file {name!r}{known}; build the benchmark (python -m real_openrlhf.data) and "
                f"give it as {name}=PATH"
            )
        found[name] = source
    return found


def _there(text: str) -> bool:
    return bool(text.strip()) and Path(expand(text)).exists()


def _name_of(item: str) -> str:
    """A benchmark's name from a file name without its endings, a folder or a hub id."""
    path = item if _there(item) else item.split("@")[0]
    return re.sub(r"[^\w.-]+", "_", Path(path).name.split(".")[0]).strip("_")


def load_benchmark(
    name: str,
    source: str,
    *,
    input_key: str,
    label_key: str,
    group_key: str | None,
    scale: ScoreScale,
    tokenizer: ChatTokenizer,
    template: PromptTemplate,
    max_prompt_tokens: int,
    max_samples: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> Benchmark:
    """Read, check and tokenise; see `JudgeDataset.load`.

    group_key: column of the groups; None: "group" if there is such a column, else every row is its own group.
    Raises DataError, and EvaluationError for a group_key that the file does not have.
    """
    data = JudgeDataset.load(
        source,
        input_key=input_key,
        label_key=label_key,
        scale=scale,
        tokenizer=tokenizer,
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        max_samples=max_samples,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
    )
    rows = _rows(source, [prompt.row for prompt in data.prompts])
    return Benchmark(
        name=name,
        source=source,
        prompts=data.prompts,
        groups=_groups(rows, group_key),
        sha256=data.sha256,
        raters=raters_of(rows.values()),
    )


def _rows(source: str, wanted: Sequence[int]) -> dict[int, Row]:
    """The rows of these indices, which were read as prompts, in the source's order."""
    indices = set(wanted)
    found: dict[int, Row] = {}
    for index, row in enumerate(read_rows(source)):
        if index in indices:
            assert isinstance(row, Row)
            found[index] = row
            if len(found) == len(indices):
                break
    return found


def _groups(rows: Mapping[int, Row], key: str | None) -> tuple[str, ...]:
    found = []
    for row in rows.values():
        if key is None and GROUP not in row.values:
            return tuple(str(number) for number in rows)
        try:
            value = lookup(row.values, key or GROUP)
        except KeyError as error:
            raise EvaluationError(f"{row.place}: --group_key: {error.args[0]}") from None
        if isinstance(value, (list, dict)) or value is None or value == "":
            raise EvaluationError(f"{row.place}, column {key or GROUP!r}: a group is text or a number, not {value!r}")
        found.append(str(value))
    return tuple(found)
