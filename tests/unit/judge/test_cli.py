"""The command line from end to end, against a scripted server."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from real_openrlhf.common.errors import RunError
from real_openrlhf.judge.calibration import FILE
from real_openrlhf.judge.cli import main
from real_openrlhf.judge.judge import Judge
from tests.helpers.completion_server import Behaviour, completion_server
from tests.helpers.tokenizers import word_tokenizer

TOKENIZER = word_tokenizer(["<e", "os>"])
ROW = {TOKENIZER.convert_tokens_to_ids(digit): p for digit, p in zip("123", (0.1, 0.2, 0.6))}
PROMPT = "rate : {} answer :"


def says(prompt) -> tuple[list[int], dict[int, float]]:
    label = "3" if TOKENIZER.convert_tokens_to_ids("good") in prompt else "1"
    return TOKENIZER.encode(f"text . So the overall score is {label} <eos>", add_special_tokens=False), ROW


@pytest.fixture
def run(folder: Path, tmp_path: Path):
    """run(rows, *flags): writes rows, judges them, returns (exit code, output rows)."""
    template = tmp_path / "short.txt"
    template.write_text("rate : {{ instruction }} answer : {{ response }}{% if rubric %} {{ rubric }}{% endif %}\n")
    with completion_server(Behaviour(model=says)) as url:

        def call(rows, *flags: str):
            source = tmp_path / "rows.jsonl"
            source.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
            out = tmp_path / "scores.jsonl"
            base = ["--model", str(folder), "--server", url, "--template", str(template), "--overwrite"]
            code = main([*base, "--input", str(source), "--output", str(out), *flags])
            made = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
            out.unlink(missing_ok=True)
            return code, made

        call.base = ["--model", str(folder), "--server", url, "--template", str(template)]  # type: ignore[attr-defined]
        yield call


def test_rows_go_in_and_scores_come_out(run, capsys) -> None:
    rows = [{"id": i, "instruction": "a", "response": word} for i, word in enumerate(("good", "bad", "good"))]
    code, made = run(rows, "--batch_size", "2")
    assert code == 0 and [{k: row[k] for k in rows[0]} for row in made] == rows
    assert [row["judgement"]["decoded"] for row in made] == [3.0, 1.0, 3.0]
    first = made[0]["judgement"]
    assert first["score"] == pytest.approx(2.3) and first["mass"] == pytest.approx(0.9)
    assert first["distribution"] == {"1": pytest.approx(0.1), "2": pytest.approx(0.2), "3": pytest.approx(0.6)}
    assert first["feedback"] == "text ." and first["reason"] is None and first["n_forced"] == 0
    assert "3/3" in capsys.readouterr().err  # the bar


def test_standard_input_to_standard_output(run, monkeypatch, capsys) -> None:
    lines = json.dumps({"instruction": "a", "response": "good"}) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main([*run.base, "--input", "-"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["judgement"]["decoded"] == 3.0 and row["response"] == "good"


def test_csv_whole_prompts_and_samples(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nrate good,3\nrate bad,1\n")
    out = tmp_path / "o.jsonl"
    flags = ["--input", str(tmp_path / "rows.csv"), "--prompt_key", "text", "--output", str(out), "--n", "2"]
    assert main([*run.base, *flags]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["judgement"]["decoded"] for r in rows] == [3.0, 1.0] and rows[0]["label"] == "3"
    assert [s["expected"] for s in rows[0]["judgement"]["samples"]] == pytest.approx([2.3, 2.3])
    assert main([*run.base, *flags]) == 2  # it exists


def test_dimensions_and_weights_from_a_file(run, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.json"
    rubric.write_text(json.dumps({"tone": "good", "facts": {"criteria": "text"}}))
    code, made = run(
        [{"instruction": "a", "response": "b"}], "--rubric", str(rubric), "--weights", '{"tone": 3, "facts": 1}'
    )
    got = made[0]["judgement"]
    assert (
        code == 0 and got["decoded"] == pytest.approx((3 * 3 + 1) / 4) and set(got["dimensions"]) == {"tone", "facts"}
    )


GOOD = {"instruction": "a", "response": "good"}


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ("{broken\n", "line 2: broken JSON"),
        ({"instruction": "a"}, "line 2, column 'response': no such column"),
        ({"instruction": "a", "response": 3}, "line 2: the response is int"),
        ({**GOOD, "judgement": 1}, "line 2, column 'judgement': the output has a column"),
        ({**GOOD, "rubric": 5}, "line 2: a rubric is a text"),
    ],
)
def test_bad_rows_are_named_or_skipped(run, capsys, caplog, bad, match: str) -> None:
    code, made = run([GOOD, bad, GOOD])
    assert code == 2 and made == [] and match in capsys.readouterr().err
    code, made = run([GOOD, bad, GOOD], "--skip_bad_rows")
    assert code == 0 and len(made) == 2 and "skipped 1 bad rows" in caplog.text and match in caplog.text


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--weights", "x"], "--weights is not JSON"),
        (["--rubric", "none.json"], "--rubric none.json"),
        (["--scale", "1-5"], "has its own settings in real_openrlhf.json; drop --scale"),
        (["--api_key_env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE, which is not set"),
        (["--server_model", "other"], "does not serve 'other'"),
        (["--template", "papr"], "paper"),
        (["--n", "0"], "at least 1"),
        (["--output", "scores.csv"], ".jsonl file or -"),
        (["--batch_size", "0"], "--batch_size"),
        (["--calibrated"], "calibration fit"),
    ],
)
def test_flags_that_cannot_work(run, capsys, flags: list[str], match: str) -> None:
    assert run([GOOD], *flags)[0] == 2
    assert match in capsys.readouterr().err


def test_a_calibration_is_fitted_on_the_output_and_used(run, folder: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "labelled.jsonl"
    rows = [{"label": y, "judgement": {"score": s}} for s, y in [(1.2, 1), (2.0, 2), (2.3, 3)] * 8]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"label": 1, "judgement": {"score": None}}]))
    fit = ["calibration", "fit", "--model", str(folder), "--data", str(data)]
    assert main(fit) == 0 and (folder / FILE).is_file()
    _, made = run([GOOD], "--calibrated")
    assert made[0]["judgement"]["calibrated"] == pytest.approx(3.0) and made[0]["judgement"]["score"] == pytest.approx(
        2.3
    )
    assert "calibrated" not in run([GOOD])[1][0]["judgement"]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:10], {"label": 9, "judgement": {"score": 1.0}}]))
    assert main(fit) == 2 and "line 11, column 'label'" in capsys.readouterr().err
    assert main([*fit, "--label_key", "lable"]) == 2 and "did you mean 'label'" in capsys.readouterr().err


def test_odd_values_in_columns_that_nobody_asked_for(run) -> None:
    rows = ['{"instruction": "a", "response": "good", "x": NaN, "y": {"z": [Infinity, 1]}}\n']
    code, (made,) = run(rows)
    assert code == 0 and made["x"] is None and made["y"] == {"z": [None, 1]}


def test_values_nested_too_deeply_are_named_before_anything_is_judged(run, capsys, caplog) -> None:
    good = '{"instruction": "a", "response": "good"}\n'
    deep = '{"instruction": "a", "response": "good", "x": ' + "[" * 600 + "]" * 600 + "}\n"
    assert run([good, deep]) == (2, [])
    assert "line 2, column 'x': its values are nested too deeply" in capsys.readouterr().err
    code, made = run([good, deep], "--skip_bad_rows")
    assert code == 0 and len(made) == 1 and "nested too deeply" in caplog.text


def test_standard_output_is_utf8_whatever_the_locale(run, monkeypatch) -> None:
    lines = json.dumps({"instruction": "a", "response": "good", "name": "评分"}) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main([*run.base, "--input", "-"]) == 0
    assert json.loads(written.getvalue().decode("utf-8"))["name"] == "评分"


def test_what_json_cannot_hold_is_named_before_anything_is_judged(run, tmp_path, capsys) -> None:
    table = pa.table({"instruction": ["a", "a"], "response": ["good", "bad"], "extra": [None, b"raw"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    out = tmp_path / "out.jsonl"
    words = [*run.base, "--input", str(tmp_path / "rows.parquet"), "--output", str(out)]
    assert main(words) == 2 and not out.exists()
    assert "row 1 (counted from 0), column 'extra': JSON has no form for a bytes" in capsys.readouterr().err
    assert main([*words, "--skip_bad_rows"]) == 0 and len(out.read_text().splitlines()) == 1


def test_a_job_that_ended_early_goes_on(run, folder, tmp_path, monkeypatch, capsys) -> None:
    source, out, partial = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    rows = [{"id": i, "instruction": "a", "response": word} for i, word in enumerate(("good", "bad", "good", "bad"))]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*run.base, "--input", str(source), "--output", str(out), "--batch_size", "2"]
    judged: list[int] = []
    real = Judge.score_prepared

    def fails(self, prepared, **kwargs):
        judged.append(len(prepared))
        if len(judged) == 2:
            raise RunError("the server went away")
        return real(self, prepared, **kwargs)

    monkeypatch.setattr(Judge, "score_prepared", fails)
    assert main(words) == 1 and not out.exists() and len(partial.read_text().splitlines()) == 2
    assert main(words) == 2 and "pass --resume to continue" in capsys.readouterr().err
    assert main([*words, "--resume", "--seed", "3"]) == 2 and "had another sampling" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"trained on")
    assert main([*words, "--resume"]) == 2 and "had another weights" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    with partial.open("a") as file:
        file.write('{"id": 2, "torn')
    assert main([*words, "--resume"]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in made] == [0, 1, 2, 3] and judged == [2, 2, 2]
    assert [row["judgement"]["decoded"] for row in made] == [3.0, 1.0, 3.0, 1.0]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


def test_a_job_without_a_record_is_not_resumed(run, tmp_path, capsys) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"instruction": "a", "response": "good"}\n')
    words = [*run.base, "--input", str(source), "--output", str(out)]
    assert main(words) == 0
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(out.read_text())
    assert main([*words, "--overwrite", "--resume"]) == 2 and "cannot be read" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert not partial.exists()
    assert main([*run.base, "--input", str(source), "--resume"]) == 2
    assert "--resume needs --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "a", "b"], "real_openrlhf.evaluate --compare RUN RUN"),
        (["calibrate"], "it is called calibration fit"),
        (["evaluate", "--model", "m"], "python -m real_openrlhf.evaluate"),
        (["sevre"], "subcommands are serve and calibration fit"),
    ],
)
def test_subcommands_that_there_are_not(words: list[str], says: str, capsys) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"there is no subcommand {words[0]!r}" in error and says in error
