"""Pairs of responses as benchmarks: two prompts per pair, one per response, or one per order of both.

A pair is two predictions: rows 2i and 2i + 1, with the file's row i. The label of the first is 1 where a is preferred,
-1 where b is and 0 for a tie; that of the second is the opposite: whatever comes first in its prompt, or stands there
alone, is preferred by so much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from real_openrlhf.data.dataset import content_hash, load_rows
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.preferences import PREFERENCES, A, B
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import BadRow, Row, lookup, shorten
from real_openrlhf.data.template import PromptError
from real_openrlhf.evals.benchmarks import GROUP, Benchmark
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.pairs import check_mode
from real_openrlhf.judge.rubrics import SINGLE, AnyRubric
from real_openrlhf.judge.types import JudgeError

PREFERENCE, SUBSET = "preference", "subset"
_LABELS = {A: 1.0, B: -1.0}
# What a name of a benchmark cannot have.
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, kw_only=True)
class _Read:
    prompts: tuple[Prompt, Prompt]
    group: str
    subset: str | None


def general_rubric(judge: Judge) -> Rubric | None:
    """For pairs that have none; None where the judge's template has no place for a rubric."""
    if "rubric" not in judge.template.variables:
        return None
    return Rubric(
        criteria="Is the response right and helpful, and does it do what the instruction asks for?",
        descriptions={
            judge.scale.labels[0]: "Wrong, useless, or something else than was asked for.",
            judge.scale.labels[-1]: "Right, helpful, and all that was asked for.",
        },
    )


def load_pairs(
    name: str,
    source: str,
    judge: Judge,
    *,
    mode: str,
    rubric: AnyRubric = None,
    group_key: str | None = None,
    by_subset: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> list[Benchmark]:
    """One benchmark, or with by_subset one per value of the column `subset`, named "name.subset".

    Columns: instruction, response_a, response_b, preference ("a", "b" or "tie"), and where there are any reference,
    context, rubric, group and subset. rubric: for pairs without one; None: `general_rubric`. group_key: column of the
    groups; None: "group" if there is such a column, else every pair is a group of its own. max_samples: pairs,
    drawn by the seed (see `JudgeDataset.load`).

    Raises DataError at the first bad row (file, row, column, reason), unless they are skipped.
    """
    check_mode(mode)
    rubric = general_rubric(judge) if rubric is None else rubric

    def read_pair(row: Row, index: int) -> _Read | BadRow:
        return _read(row, index, judge, mode, rubric, group_key, by_subset)

    read, _ = load_rows(source, read_pair, max_samples=max_samples, seed=seed, skip_bad_rows=skip_bad_rows)
    if not by_subset:
        return [_benchmark(name, source, read, mode)]
    subsets = dict.fromkeys(row.subset for row in read)
    names = {subset: f"{name}.{_NOT_IN_NAMES.sub('_', str(subset))}" for subset in subsets}
    if len(set(names.values())) < len(names):
        raise EvaluationError(f"{source}, column {SUBSET!r}: two of {list(names)} would have one name; rename one")
    return [_benchmark(names[s], source, [row for row in read if row.subset == s], mode) for s in subsets]


def _benchmark(name: str, source: str, rows: Sequence[_Read], mode: str) -> Benchmark:
    prompts = tuple(prompt for row in rows for prompt in row.prompts)
    groups = tuple(row.group for row in rows for _ in row.prompts)
    return Benchmark(
        name=name, source=source, prompts=prompts, groups=groups, sha256=content_hash(prompts), pair_mode=mode
    )


def _read(
    row: Row, index: int, judge: Judge, mode: str, rubric: AnyRubric, group_key: str | None, by_subset: bool
) -> _Read | BadRow:
    column: str | None = PREFERENCE
    try:
        preference = lookup(row.values, PREFERENCE)
        if preference not in PREFERENCES:
            raise PromptError(f"expected {', '.join(PREFERENCES)}, got {shorten(preference)}")
        sides = []
        for column in ("response_a", "response_b"):
            sides.append(lookup(row.values, column))
            if not isinstance(sides[-1], str):
                raise PromptError(f"expected text, got {shorten(sides[-1])}")
        column = "instruction"
        item = {"instruction": lookup(row.values, column)}
        item |= {name: row.values[name] for name in ("reference", "context") if _there(row.values, name)}
        item["rubric"] = row.values["rubric"] if _there(row.values, "rubric") else rubric
        column = group_key or GROUP
        group = lookup(row.values, column) if group_key or GROUP in row.values else index
        if isinstance(group, (list, dict)) or group is None or group == "":
            raise PromptError(f"a group is text or a number, not {shorten(group)}")
        column = SUBSET
        subset = lookup(row.values, SUBSET) if by_subset else None
        if by_subset and (not isinstance(subset, str) or not subset.strip()):
            raise PromptError(f"--by_subset: expected text, got {shorten(subset)}")
        column = None
        prepared = judge.prepare_pair(item, sides[0], sides[1], mode=mode)
        if any(set(prompts) != {SINGLE} for prompts in prepared):
            raise JudgeError("a rubric of several dimensions is for Judge.compare; pairs are judged by one")
    except KeyError as error:
        return BadRow(place=row.place, column=column, reason=str(error.args[0]))
    except (PromptError, JudgeError) as error:
        return BadRow(place=row.place, column=column, reason=str(error))
    label = _LABELS.get(preference, 0.0)
    first, second = (prompts[SINGLE] for prompts in prepared)
    prompts = replace(first, row=2 * index, label=label), replace(second, row=2 * index + 1, label=0.0 - label)
    return _Read(prompts=prompts, group=str(group), subset=subset)


def _there(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    return value is not None and not (isinstance(value, str) and not value.strip())
