"""Names of benchmarks, and their groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.evals.benchmarks import Benchmark, load_benchmark, parse_benchmarks
from real_openrlhf.evals.predictions import EvaluationError
from tests.helpers.tiny_judge import make_tokenizer


@pytest.mark.parametrize(
    ("texts", "want"),
    [
        (["/data/test.parquet"], {"test": "/data/test.parquet"}),
        (["a=/x.parquet", "b=/y"], {"a": "/x.parquet", "b": "/y"}),
        (["a=/x,b=/y, c.parquet"], {"a": "/x", "b": "/y, c.parquet"}),
        (["owner/name@test"], {"name": "owner/name@test"}),
        (["flask=owner/name@test,mt_bench=z.json"], {"flask": "owner/name@test", "mt_bench": "z.json"}),
        (["dir=with/a=b.jsonl"], {"dir": "with/a=b.jsonl"}),
        (["./with/a=b.jsonl"], {"a=b": "./with/a=b.jsonl"}),
    ],
)
def test_names_and_sources(texts: list[str], want: dict[str, str]) -> None:
    if "a=b" in want:
        # A name that no metric could have.
        with pytest.raises(EvaluationError, match="is not a benchmark"):
            parse_benchmarks(texts, "--eval.dataset")
    else:
        assert parse_benchmarks(texts, "--eval.dataset") == want


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=x,a=y"], "--flag: two benchmarks are named 'a'"),
        (["x/t.jsonl", "y/t.jsonl"], "two benchmarks are named 't'"),
        (["expected=x"], "cannot be named 'expected'"),
        (["vicuna"], r"there is no file 'vicuna' \(did you mean 'vicuna_bench'\?\)"),
        ([""], "is not a benchmark"),
        (["a="], "is not a benchmark"),
    ],
)
def test_wrong_names(texts: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_benchmarks(texts, "--flag")


def load(path: Path, rows: list[dict[str, Any]], **changes: Any) -> Benchmark:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = dict(
        input_key="prompt",
        label_key="label",
        group_key=None,
        scale=ScoreScale.parse("1-5"),
        tokenizer=make_tokenizer(),
        template=PromptTemplate(),
        max_prompt_tokens=9,
    )
    return load_benchmark("b", str(path), **{**options, **changes})


def test_groups(tmp_path: Path) -> None:
    rows = [{"prompt": "fine judge", "label": 3, "group": g, "id": {"q": i}} for i, g in enumerate(["x", "x", 7])]
    path = tmp_path / "a.jsonl"
    assert load(path, rows).groups == ("x", "x", "7")
    assert load(path, rows, group_key="id.q").groups == ("0", "1", "2")
    assert load(path, rows, max_samples=2).groups == ("x", "x")
    bare = [{"prompt": "fine judge", "label": 3}] * 3
    assert load(path, bare).groups == ("0", "1", "2")
    # Rows that are left out do not shift the groups.
    rows[0]["label"] = 9
    loaded = load(path, rows, skip_bad_rows=True)
    assert loaded.groups == ("x", "7") and [p.row for p in loaded.prompts] == [1, 2]
    with pytest.raises(EvaluationError, match=r"line 1: --group_key: no such column"):
        load(path, bare, group_key="question")
    with pytest.raises(EvaluationError, match=r"line 2, column 'group': a group is text or a number, not None"):
        load(path, [{**bare[0], "group": "x"}, {**bare[0], "group": None}])


def test_the_hash_is_that_of_ids_and_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "fine judge", "label": 3}, {"prompt": "rude judge", "label": 1}]
    one = load(tmp_path / "a.jsonl", rows)
    assert load(tmp_path / "b.jsonl", [{**row, "group": "g"} for row in rows]).sha256 == one.sha256
    assert load(tmp_path / "b.jsonl", [rows[0], {**rows[1], "label": 2}]).sha256 != one.sha256
