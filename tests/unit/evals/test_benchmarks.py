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
        # Names that a metric could not have.
        (["./with/a=b.jsonl"], {"a_b": "./with/a=b.jsonl"}),
        (["/x/test set.jsonl"], {"test_set": "/x/test set.jsonl"}),
        (["/x/(new) é.v2.jsonl"], {"new_é": "/x/(new) é.v2.jsonl"}),
        (["/x/数据.jsonl"], {"数据": "/x/数据.jsonl"}),
        (["数据=/x/a b.jsonl,été=/y"], {"数据": "/x/a b.jsonl", "été": "/y"}),
    ],
)
def test_names_and_sources(texts: list[str], want: dict[str, str]) -> None:
    assert parse_benchmarks(texts, "--eval.dataset") == want


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("test set.jsonl", "test_set"),
        ("données.jsonl", "données"),
        ("数据.jsonl", "数据"),
        ("a=b.jsonl", "a_b"),
        ("x,a=b.jsonl", "x_a_b"),
        ("me@home.jsonl", "me_home"),
    ],
)
def test_a_file_that_is_there_is_a_path_whatever_its_name(
    file: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).touch()
    assert parse_benchmarks([file], "--eval.dataset") == {name: file}
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = f"{tmp_path}/{file}"
    assert parse_benchmarks([f"~/{file}"], "--eval.dataset") == {name: whole}
    assert parse_benchmarks([f"one=~/{file}", "two=~"], "--eval.dataset")["two"] == str(tmp_path)


def test_every_source_of_a_list_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/é x")
    assert parse_benchmarks(["a=~/1.json,b=~/2.json"], "--f") == {"a": "/home/é x/1.json", "b": "/home/é x/2.json"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=x,a=y"], "--flag: two benchmarks are named 'a'"),
        (["x/t.jsonl", "y/t.jsonl"], "two benchmarks are named 't'"),
        (["expected=x"], "cannot be named 'expected'"),
        (["vicuna"], r"there is no file 'vicuna' \(did you mean 'vicuna_bench'\?\)"),
        ([""], "is not a benchmark"),
        (["a="], "is not a benchmark"),
        (["/x/!.jsonl"], r"no name can be made from '/x/!.jsonl'; write NAME=PATH"),
        (["a b.jsonl", "a_b.jsonl"], "two benchmarks are named 'a_b'"),
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
    some = load(path, rows, max_samples=2, seed=1)
    assert some.groups == tuple(str(rows[p.row]["group"]) for p in some.prompts)
    assert {load(path, rows, max_samples=1, seed=seed).groups for seed in range(9)} == {("x",), ("7",)}
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
