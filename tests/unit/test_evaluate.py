"""The evaluate command from end to end, against a scripted server: files, resuming, comparison, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from transformers import LlamaConfig

from real_openrlhf import evaluate
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.evals.judging import name_of
from real_openrlhf.export.settings import JudgeSettings
from tests.helpers.completion_server import Behaviour, completion_server
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer

TOKENIZER = word_tokenizer(["<e", "os>"], chat_template=CHAT_TEMPLATE)
PROBS = {"good": (0.1, 0.2, 0.6), "text": (0.2, 0.5, 0.2), "bad": (0.7, 0.2, 0.1)}
ROWS = [
    {"prompt": f"rate : {word}", "label": label, "group": f"q{i // 2}"}
    for i, (word, label) in enumerate([("good", 3), ("bad", 1), ("text", 2.5), ("good", 2), ("bad", 1.5), ("text", 3)])
]


def says(prompt: list[int]) -> tuple[list[int], dict[int, float]]:
    word = next(w for w in PROBS if TOKENIZER.convert_tokens_to_ids(w) in prompt)
    label = str(1 + max(range(3), key=PROBS[word].__getitem__))
    row = {TOKENIZER.convert_tokens_to_ids(digit): p for digit, p in zip("123", PROBS[word])}
    said = "" if prompt[-1] == TOKENIZER.convert_tokens_to_ids("is") else "a . So the overall score is "
    return TOKENIZER.encode(f"{said}{label} <eos>", add_special_tokens=False), row


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "judge"
    path.mkdir()
    TOKENIZER.save_pretrained(path)
    LlamaConfig(vocab_size=len(TOKENIZER)).save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"weights")
    JudgeSettings(
        scale=ScoreScale.parse("1-3"),
        anchors=("So the overall score is ",),
        end_ids=(TOKENIZER.eos_token_id,),
        template=PromptTemplate(apply_chat_template=True),
        max_new_tokens=20,
    ).save(path)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(model: Path, tmp_path: Path):
    """run(*flags): judges two benchmarks into <tmp_path>/out; `run.server` counts the requests."""
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", list(reversed(ROWS)))
    behaviour = Behaviour(model=says)
    with completion_server(behaviour) as url:

        def call(*flags: str, out: str = "out") -> int:
            names = [] if "--benchmark" in flags else ["--benchmark", f"flask={tmp_path / 'a.jsonl'}",
                                                       f"mt_bench={tmp_path / 'b.jsonl'}"]  # fmt: skip
            base = ["--model", str(model), "--server", url, "--output_dir", str(tmp_path / out)]
            return evaluate.main([*base, *names, "--n_resamples", "40", *flags])

        call.server = behaviour  # type: ignore[attr-defined]
        yield call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_written(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--method", "Tiny", "--training", "SFT") == 0
    out = tmp_path / "out"
    header, *rows = lines(out / "predictions.jsonl")
    assert set(header["identity"]["benchmarks"]) == {"flask", "mt_bench"} and header["identity"]["scale"] == "1,2,3"
    assert [(r["benchmark"], r["row"], r["label"], r["group"]) for r in rows[:6]] == [
        ("flask", i, row["label"], row["group"]) for i, row in enumerate(ROWS)
    ]
    first = rows[0]
    assert first["expected"] == pytest.approx(0.1 + 0.4 + 1.8) and first["decoded"] == 3.0
    assert first["distribution"] == pytest.approx([0.1, 0.2, 0.6]) and first["mass"] == pytest.approx(0.9)
    (sample,) = first["samples"]
    assert sample["feedback"] == "a ." and not sample["forced"]
    assert TOKENIZER.decode(sample["token_ids"][: sample["position"]]).endswith("score is")

    results = json.loads((out / "results.json").read_text())
    want = stats.pearsonr([r["expected"] for r in rows[:6]], [r["label"] for r in ROWS]).statistic
    found = results["benchmarks"]["flask"]["scores"]["expected"]["pearson"]
    assert found["estimate"] == pytest.approx(want) and found["low"] <= want <= found["high"]
    assert results["benchmarks"]["flask"]["n_groups"] == 3
    table = {(r["benchmark"], r["reading"], r["metric"]): r for r in csv.DictReader((out / "results.csv").open())}
    assert float(table["flask", "expected", "pearson"]["estimate"]) == pytest.approx(want)
    markdown = (out / "results.md").read_text()
    assert "| Tiny | SFT | RAIL |" in markdown and "| FLASK r | ρ | τ | forced | MT Bench r |" in markdown
    assert f"| {100 * want:.1f} |" in markdown and "Average r" in markdown
    plots = {f"{b}_{kind}.png" for b in ("flask", "mt_bench") for kind in ("scatter", "reliability", "confusion")}
    assert {p.name for p in (out / "plots").iterdir()} == plots | {"error_by_benchmark.png"}
    shown = capsys.readouterr()
    assert "| Tiny | SFT | Standard |" in shown.out and "| forced |" in shown.out and "forced anchor" in shown.out
    assert "12/12" in shown.err


def test_an_interrupted_evaluation_goes_on_where_it_stopped(run, tmp_path: Path, capsys) -> None:
    assert run("--batch_size", "2") == 0
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    wanted = (tmp_path / "out" / "results.json").read_text()
    # Killed in the middle of writing the sixth judgement.
    kept = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:6]) + kept[6][:40])
    before = len(run.server.requests)
    assert run("--batch_size", "5") == 0
    assert len(run.server.requests) - before == 7
    assert path.read_bytes() == whole and (tmp_path / "out" / "results.json").read_text() == wanted
    # The speed is that of the rows that this command judged.
    speed = json.loads((tmp_path / "out/speed.json").read_text())
    assert (speed["judgements"], speed["batch_size"], speed["backend"]) == (7, 5, "server")
    assert speed["generated_tokens"] == sum(row["samples"][0]["n_generated"] for row in lines(path)[6:])
    assert speed["judgements_per_second"] == pytest.approx(7 / speed["seconds"])
    # Finished: nothing is judged again.
    capsys.readouterr()
    assert run() == 0 and len(run.server.requests) - before == 7
    assert "judgements/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", "3"), "sampling"),
        (("--max_samples", "2"), "benchmarks"),
        (("--no_force",), "force"),
        (("--renormalise",), "renormalise"),
    ],
)
def test_other_settings_do_not_continue_a_file(run, capsys, flags: tuple[str, ...], message: str) -> None:
    assert run() == 0
    assert run(*flags) == 2
    assert f"holds another evaluation and cannot be continued: {message}" in capsys.readouterr().err


def test_other_weights_do_not_continue_a_file(run, model: Path, capsys) -> None:
    assert run() == 0
    (model / "model.safetensors").write_bytes(b"other!!")
    assert run() == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_a_file_that_is_none_of_ours_is_left_alone(run, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text('{"a": 1}\n')
    assert run() == 2
    assert "its first line is not their header" in capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == '{"a": 1}\n'


def test_two_runs_are_compared_in_pairs(run, tmp_path: Path, capsys) -> None:
    assert run(out="one") == 0 and run("--renormalise", "--method", "other", out="two") == 0
    PROBS_WERE = dict(PROBS)
    try:
        PROBS["text"] = (0.05, 0.4, 0.5)
        assert run("--seed", "1", "--method", "better", out="three") == 0
    finally:
        PROBS.update(PROBS_WERE)
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("one", "three")]
    assert evaluate.main(["--compare", *folders, "--output_dir", str(tmp_path / "c"), "--n_resamples", "40"]) == 0
    text = capsys.readouterr().out
    plot = tmp_path / "c" / "comparison.png"
    assert plot.read_bytes().startswith(b"\x89PNG") and text.endswith(f"plot of the differences: {plot}\n")
    written = (tmp_path / "c" / "comparison.md").read_text()
    assert written.startswith(text[: text.index("\nplot of")]) and written.endswith("](comparison.png)\n")
    assert "## better less judge" in text and "| judge |  | RAIL |" in text
    content = json.loads((tmp_path / "c" / "comparison.json").read_text())
    found = content["comparisons"][0]["benchmarks"]["flask"]["expected/mae"]
    one, three = (
        json.loads((tmp_path / name / "results.json").read_text())["benchmarks"]["flask"]["scores"]["expected"]["mae"]
        for name in ("one", "three")
    )
    assert found["difference"] == pytest.approx(three["estimate"] - one["estimate"]) and found["low"] <= found["high"]
    assert evaluate.main(["--compare", *[str(tmp_path / n) for n in ("one", "two")]]) == 2
    assert "renormalise is False in the first and True in the second" in capsys.readouterr().err
    # Runs of one name are told apart by their folders.
    assert evaluate.main(["--compare", folders[0], folders[0], "--n_resamples", "10"]) == 0
    assert f"| {folders[0]} |  | RAIL |" in capsys.readouterr().out
    assert evaluate.main(["--compare", str(tmp_path / "one"), str(tmp_path)]) == 2
    assert "there is no results.json of a finished evaluation (none ran)" in capsys.readouterr().err


def test_the_feedback_of_another_run_is_read_anew(run, tmp_path: Path, caplog, capsys) -> None:
    caplog.set_level("INFO")
    assert run(out="one") == 0
    before = len(run.server.requests)
    probs = dict(PROBS)
    try:
        PROBS["text"] = (0.2, 0.2, 0.5)  # E 2.1 instead of 1.8
        assert run("--feedback_of", str(tmp_path / "one"), out="again") == 0
    finally:
        PROBS.update(probs)
    assert "differs by at most 3.00e-01 over 12 rows" in caplog.text
    _, *first = lines(tmp_path / "one" / "predictions.jsonl")
    _, *again = lines(tmp_path / "again" / "predictions.jsonl")
    asked = [request["prompt"] for request in run.server.requests[before:]]
    for a, b in zip(first, again):
        (old,), (new,) = a["samples"], b["samples"]
        ids = old["token_ids"][: old["position"]]
        assert new["token_ids"][: new["position"]] == ids and any(prompt[-len(ids) :] == ids for prompt in asked)
        assert (a["row"], a["group"], a["label"]) == (b["row"], b["group"], b["label"])
    assert run("--feedback_of", str(tmp_path / "one"), "--max_samples", "3", out="less") == 0
    assert run("--feedback_of", str(tmp_path / "less"), out="more") == 2
    kept = {r["row"] for r in lines(tmp_path / "less" / "predictions.jsonl")[1:4]}
    missing = min(set(range(len(ROWS))) - kept)
    assert f"row {missing} of flask is missing there" in capsys.readouterr().err


def test_a_sample_is_that_of_the_seed(run, tmp_path: Path, capsys) -> None:
    for out, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert run("--max_samples", "3", "--seed", seed, out=out) == 0
    rows = {out: [(r["benchmark"], r["row"]) for r in lines(tmp_path / out / "predictions.jsonl")[1:]] for out in "abc"}
    assert rows["a"] == rows["b"] != rows["c"] and len(rows["a"]) == 6
    assert [row for name, row in rows["a"] if name == "flask"] == sorted({row for _, row in rows["a"]})
    assert evaluate.main(["--compare", *[str(tmp_path / out) for out in "ac"]]) == 2
    assert "--max_samples with one --seed" in capsys.readouterr().err


def test_constant_labels_are_said_in_words(run, tmp_path: Path, capsys) -> None:
    write(tmp_path / "a.jsonl", [{**row, "label": 2} for row in ROWS])
    assert run("--benchmark", f"flask={tmp_path / 'a.jsonl'}") == 0
    shown = capsys.readouterr().out
    assert "(1) undefined: all labels are 2" in shown and "nan" not in shown.lower()
    text = (tmp_path / "out" / "results.json").read_text()
    found = json.loads(text)["benchmarks"]["flask"]["scores"]["expected"]["pearson"]
    assert found["estimate"] is None and found["note"] == "undefined: all labels are 2"
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--benchmark", "flsk"), r"there is no file 'flsk' (did you mean 'flask'?)"),
        (("--benchmark", "flask=nowhere.parquet"), "nowhere.parquet: there is no such file"),
        (("--benchmark", "flask=x", "flask=y"), "two benchmarks are named 'flask'"),
        (("--benchmark", "average=x"), "cannot be named 'average'"),
        (("--label_key", "score"), "column 'score': no such column"),
        (("--group_key", "question"), "--group_key: no such column"),
        (("--n", "0"), "--n must be at least 1"),
        (("--max_new_tokens", "4090"), "--max_"),
        (("--scale", "1-5"), "drop --scale"),
        (("--confidence", "1"), "--confidence must lie between 0 and 1"),
        (("--compare", "x", "y"), "drop --model and --benchmark"),
        (("--server", "http://h:1", "--backend", "transformers"), "--backend transformers runs the model in this"),
    ],
)
def test_wrong_flags_are_named(run, capsys, flags: tuple[str, ...], message: str) -> None:
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and "--data." not in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "rate : good", "label": 4}], "line 1, column 'label': 4.0 is off the scale [1, 3]"),
        ([{"prompt": "rate : good"}], "no such column"),
        ([], "the file is empty"),
        ([{"prompt": "rate : good", "label": "high"}], "'high' is not a number"),
    ],
)
def test_wrong_files_are_named(run, tmp_path: Path, capsys, rows: list[dict[str, Any]], message: str) -> None:
    path = write(tmp_path / "wrong.jsonl", rows)
    assert run("--benchmark", f"x={path}") == 2
    error = capsys.readouterr().err
    assert "wrong.jsonl" in error and message in error


def test_what_is_missing_is_named(capsys) -> None:
    given = ["--model", "m", "--benchmark", "x=y"]
    for flags, name in ((given[:0], "model"), (given[:2], "benchmark"), (given, "output_dir")):
        assert evaluate.main(flags) == 2
        assert f"--{name} is required" in capsys.readouterr().err
    assert evaluate.main(["--compare", "one"]) == 2
    assert "two output folders or more" in capsys.readouterr().err


def test_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "real-1" / "model").mkdir(parents=True)
    assert name_of(str(tmp_path / "real-1" / "model")) == "real-1"
    assert name_of(str(tmp_path / "real-1") + "/") == "real-1"
    assert name_of("owner/model") == "owner/model"


def test_the_raters_own_agreement_stands_beside_the_judge(run, tmp_path: Path, capsys) -> None:
    ratings = [(3, 3, 2), (1, 2, 1), (2, 3, 3), (2, 2, 1), (1, 1, 3), (3, 3, 3)]
    rows = [
        {**row, "meta": json.dumps({"aspect": "Overall", "ratings": dict(zip(("ann", "bob", "cy"), each))})}
        for row, each in zip(ROWS, ratings)
    ]
    rated = write(tmp_path / "rated.jsonl", [*rows, {**ROWS[0], "meta": "no JSON"}, {**ROWS[0], "meta": '{"n": 1}'}])
    assert run("--benchmark", f"rated={rated}", f"plain={tmp_path / 'a.jsonl'}") == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["raters"]
    assert list(found) == ["rated"] and list(found["rated"]) == ["Overall"]
    columns = list(zip(*ratings))
    alone = [
        stats.pearsonr(own, [sum(other) / 2 for other in zip(*(c for c in columns if c is not own))]).statistic
        for own in columns
    ]
    assert found["rated"]["Overall"]["pearson"] == pytest.approx(sum(alone) / 3)
    assert found["rated"]["Overall"]["rows"] == 6
    shown = capsys.readouterr().out
    assert f"| rated, Overall | 6 | 3 | {found['rated']['Overall']['spread']:.3f} | {sum(alone) / 3:.3f} |" in shown
    table = shown.split("| The raters themselves")[1].split("\n\n")[0]
    assert table in (tmp_path / "out/results.md").read_text()
    # The finished run is read again for a comparison.
    assert run("--benchmark", f"rated={rated}", "--max_samples", "4", out="few") == 0
    few = json.loads((tmp_path / "few/results.json").read_text())
    assert few["benchmarks"]["rated"]["n"] == 4 and few["raters"]["rated"]["Overall"]["rows"] <= 4
