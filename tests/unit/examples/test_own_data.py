"""The example that begins with a CSV: its files, its stand-in for a user's model, and the report."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from examples.own_data import make_csv, make_model, report
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.__main__ import main as build
from real_openrlhf.data.overlap_feedback import write_feedback
from real_openrlhf.data.row import DataError

PAIRS = [("A man plays.", "A man is playing.", 4.8), ("A dog runs.", "It rains.", 0.2)]


def stsb(folder: Path) -> Path:
    long = " ".join(["word"] * 11)
    train = [*PAIRS, (long, "short", 1.0)]
    dev = [("A man plays.", "He plays.", 3.0), ("A cat sleeps.", "A cat naps.", 4.0), ("A cat eats.", "Rain.", 0.0)]
    for split, rows in (("train", train), ("dev", dev)):
        lines = [json.dumps({"instruction": a, "response": b, "criteria": "c", "score": y}) for a, b, y in rows]
        (folder / f"stsb_{split}.jsonl").write_text("\n".join(lines))
    return folder


def made(tmp_path: Path) -> Path:
    make_csv.main(["--data_dir", str(stsb(tmp_path)), "--output_dir", str(tmp_path / "csv")])
    return tmp_path / "csv"


def test_the_csv_has_question_answer_and_score_of_short_sentences(tmp_path: Path) -> None:
    folder = made(tmp_path)
    with (folder / "judgments.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"question": f"Say it in other words: {a}", "answer": b, "score": str(y)} for a, b, y in PAIRS]
    # What is to be judged later has no score, and no question that was trained on.
    new = (folder / "new.csv").read_text().splitlines()
    assert new == [
        "question,answer",
        "Say it in other words: A cat sleeps.,A cat naps.",
        "Say it in other words: A cat eats.,Rain.",
    ]


def test_columns_that_are_not_stsbs_are_named(tmp_path: Path) -> None:
    (tmp_path / "stsb_train.jsonl").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"stsb_train.jsonl, line 1: no column 'instruction'; the columns are \['a'\]"):
        make_csv.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "csv")])


def test_the_stand_in_learns_from_the_training_sentences_and_no_score(tmp_path: Path) -> None:
    columns = ["instruction=question", "response=answer", "label=score"]
    words = ["generic", "--source", str(made(tmp_path) / "judgments.csv"), "--map", *columns, "--scale", "0-5"]
    assert build([*words, "--template", "answer", "--output_dir", str(tmp_path / "data")]) == 0
    pairs = make_model.read_pairs(str(tmp_path / "data/train.parquet"))
    assert pairs == [(a, b) for a, b, _ in PAIRS]
    drawn = list(make_model.some_pairs(pairs, 300, random.Random(0)))
    known = {word for a, b, _ in PAIRS for word in f"{a} {b}".split()}
    assert len(drawn) == 300 and {word for pair in drawn for text in pair for word in text.split()} <= known
    assert not any(c.isdigit() for a, b in drawn for c in write_feedback(a, b, random.Random(0)))

    tokenizer = make_model.make_tokenizer([f"{a} {b}" for a, b in drawn])
    bound = bind_scale(ScoreScale.parse("0-5"), tokenizer)
    assert [len(ids) for ids in bound.anchors[0].labels] == [1] * 6
    text = "Né 1984: 谁？"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # any text can be judged


def test_server_and_engine_are_compared_on_the_same_rows(tmp_path: Path) -> None:
    def write(name: str, *rows: tuple[str, float | None]) -> Path:
        path = tmp_path / name
        lines = [{"question": q, "answer": "a", "judgement": {"score": score}} for q, score in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    one = write("one", ("x", 1.0), ("y", 2.5), ("z", None))
    assert report.largest_difference(one, write("two", ("x", 1.25), ("y", 2.0), ("z", 1.0))) == 0.5
    with pytest.raises(ValueError, match="hold other rows"):
        report.largest_difference(one, write("three", ("y", 1.0)))


def test_the_table_shows_both_judges_and_what_is_undefined() -> None:
    numbers = {"estimate": 0.5, "low": 0.4, "high": 0.6}
    undefined = {"estimate": None, "low": None, "high": None}
    scores = {"expected": dict.fromkeys(report.METRICS, numbers), "decoded": dict.fromkeys(report.METRICS, undefined)}
    change = {"difference": 0.1, "low": -0.05, "high": 0.25}
    differences = {f"{r}/{m}": change for r in report.READINGS for m in report.METRICS}
    judges = {judge: {"n": 7, "scores": scores} for judge in report.JUDGES}
    shown = report.table({"test": judges, "real less warmup": differences}).splitlines()
    assert "7 test rows" in shown[0]
    assert shown[4] == "| E[score] | pearson | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] | +0.100 [-0.050, +0.250] |"
    assert shown[7] == "| as written | pearson | undefined | undefined | +0.100 [-0.050, +0.250] |"
