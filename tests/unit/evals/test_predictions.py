"""The file of predictions: whole lines, one identity, each row once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from real_openrlhf.evals.predictions import EvaluationError, Prediction, PredictionStore, read_predictions
from tests.helpers.predictions import make_prediction

IDENTITY = {"model": "m", "anchors": ("a", "b"), "sampling": {"n": 1}}


def store(path: Path, rows: int = 2) -> PredictionStore:
    made = PredictionStore(path, IDENTITY)
    made.append(make_prediction(i) for i in range(rows))
    made.close()
    return made


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [make_prediction(0), make_prediction(1, 2.5, None, None, benchmark="b"), make_prediction(2, 1.0, [None] * 5)]
    made = PredictionStore(tmp_path / "p.jsonl", IDENTITY)
    made.append(rows)
    made.close()
    identity, found = read_predictions(tmp_path / "p.jsonl")
    assert found == rows and identity == {**IDENTITY, "anchors": ["a", "b"]}
    again = PredictionStore(tmp_path / "p.jsonl", IDENTITY)
    assert again.done == {row.key: row for row in rows}
    again.close()


def test_a_torn_line_is_judged_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    store(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = PredictionStore(path, IDENTITY)
    assert set(again.done) == {("flask", 0)}
    again.append([make_prediction(1)])
    again.close()
    assert path.read_bytes() == whole


def test_a_torn_header_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"format": "real_op')
    assert store(path).done.keys() == {("flask", 0), ("flask", 1)}
    assert read_predictions(path)[0]["model"] == "m"


def test_another_evaluation_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    store(path)
    whole = path.read_bytes()
    with pytest.raises(EvaluationError, match=r"cannot be continued: sampling: \{'n': 1\} in the file, \{'n': 2\} now"):
        PredictionStore(path, {**IDENTITY, "sampling": {"n": 2}})
    with pytest.raises(EvaluationError, match="force: None in the file, True now"):
        PredictionStore(path, {**IDENTITY, "force": True})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "line 2 is not a record"),
        ("[1]", "line 2 is not a prediction: a Prediction has the fields"),
        (json.dumps({"benchmark": "x"}), "line 2 is not a prediction"),
    ],
)
def test_lines_that_are_no_predictions(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    store(path, rows=0)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(EvaluationError, match=message):
        read_predictions(path)


def test_a_second_writer(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    first = PredictionStore(path, IDENTITY)
    first.append([make_prediction(0)])
    with pytest.raises(EvaluationError, match=rf"--output_dir {tmp_path} is in use"):
        PredictionStore(path, IDENTITY)
    first.append([make_prediction(1)])
    first.close()
    second = PredictionStore(path, IDENTITY)
    assert len(second.done) == 2
    second.close()
    # One of another evaluation lets go.
    with pytest.raises(EvaluationError, match="cannot be continued"):
        PredictionStore(path, {**IDENTITY, "model": "another"})
    PredictionStore(path, IDENTITY).close()


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(EvaluationError, match="there is no such file"):
        read_predictions(path)
    path.write_text("")
    with pytest.raises(EvaluationError, match="is empty"):
        read_predictions(path)
    path.write_text('{"format": "real_openrlhf.predictions", "version": 9, "identity": {}}\n')
    with pytest.raises(EvaluationError, match="format version 9"):
        read_predictions(path)
    path.unlink()
    store(path, rows=1)
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(EvaluationError, match="holds row 0 of flask 2 times"):
        read_predictions(path)
    with pytest.raises(EvaluationError, match="cannot be written"):
        PredictionStore(path / "missing" / "p.jsonl", IDENTITY)


def test_shares_of_samples() -> None:
    free, forced, invalid = (
        make_prediction(0).samples[0],
        make_prediction(0, forced=True).samples[0],
        make_prediction(0, 3.0, None, None).samples[0],
    )
    prediction = make_prediction(0, samples=(free, forced, invalid, invalid))
    assert (prediction.forced_share, prediction.invalid_share) == (0.25, 0.5)
    assert Prediction.from_json(json.loads(json.dumps(prediction.to_json()))) == prediction
