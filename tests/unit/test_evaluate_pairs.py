"""evaluate --pairs from end to end, against a scripted server: what is asked, files, comparison, bad input."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf import evaluate
from tests.helpers.completion_server import Behaviour, completion_server
from tests.unit.test_evaluate import PROBS, ROWS, TOKENIZER, lines, model, says, write

__all__ = ["model"]  # a fixture

PAIRS: list[dict[str, Any]] = [
    dict(zip(("instruction", "response_a", "response_b", "preference", "group", "subset"), row))
    for row in (
        ("a", "good", "bad", "a", "q0", "easy"),
        ("a", "bad", "text", "b", "q0", "easy"),
        ("b", "text", "good", "a", "q1", "hard"),
        ("b", "text", "text", "tie", "q1", "hard"),
    )
]
WORDS = {TOKENIZER.convert_tokens_to_ids(word): word for word in PROBS}


def says_of_two(prompt: list[int]) -> tuple[list[int], dict[int, float]]:
    """With two answers in the prompt: 3 for a better first one, 1 for a better second one, and 3 for a tie."""
    first, second, *_ = [WORDS[token] for token in prompt if token in WORDS]
    order = ["bad", "text", "good"]
    word = "bad" if order.index(first) < order.index(second) else "good"
    return says([TOKENIZER.convert_tokens_to_ids(word), *prompt[-1:]])


@pytest.fixture
def run(model: Path, tmp_path: Path):
    """run(*flags): judges the pairs into <tmp_path>/out; `run.server` counts the requests."""
    write(tmp_path / "p.jsonl", PAIRS)
    template = tmp_path / "t.txt"
    template.write_text("rate : {{ instruction }} answer : {{ response }}")
    with_rubric = tmp_path / "r.txt"
    with_rubric.write_text("rate : {{ instruction }} answer : {{ response }} by : {{ rubric }}")
    behaviour = Behaviour(model=says)
    with completion_server(behaviour) as url:

        def call(*flags: str, out: str = "out", name: str = "t.txt", file: str = "p.jsonl") -> int:
            base = ["--model", str(model), "--server", url, "--output_dir", str(tmp_path / out)]
            pairs = ["--pairs", f"two={tmp_path / file}", "--template", str(tmp_path / name)]
            return evaluate.main([*base, *pairs, "--n_resamples", "40", *flags])

        call.server = behaviour  # type: ignore[attr-defined]
        yield call


def test_each_response_is_judged_by_itself(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    header, *rows = lines(tmp_path / "out/predictions.jsonl")
    assert [(r["row"], r["label"], r["decoded"], r["group"]) for r in rows] == [
        (0, 1.0, 3.0, "q0"), (1, -1.0, 1.0, "q0"), (2, -1.0, 1.0, "q0"), (3, 1.0, 2.0, "q0"),
        (4, 1.0, 2.0, "q1"), (5, -1.0, 3.0, "q1"), (6, 0.0, 2.0, "q1"), (7, 0.0, 2.0, "q1"),
    ]  # fmt: skip
    assert header["identity"]["benchmarks"]["two"]["pair_mode"] == "scores"
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["benchmarks"] == {} and results["average"] is None and results["tie_margin"] == 0.0
    found = results["pairs"]["two"]
    assert (found["n"], found["n_groups"], found["n_ties"]) == (4, 2, 1)
    for reading in ("expected", "decoded"):
        assert found["scores"][reading]["accuracy"]["estimate"] == pytest.approx(2 / 3)
        assert found["scores"][reading]["accuracy_three_way"]["estimate"] == pytest.approx(3 / 4)
    table = {
        (r["benchmark"], r["reading"], r["metric"]): r for r in csv.DictReader((tmp_path / "out/results.csv").open())
    }
    assert float(table["pairs/two", "decoded", "accuracy"]["estimate"]) == pytest.approx(2 / 3)
    text = (tmp_path / "out/results.md").read_text()
    assert "## Pairs" in text and "| two | RAIL | 4 | 2 | 1 | 0.667 [" in text and "Correlations" not in text
    shown = capsys.readouterr()
    assert "| two | Standard | 4 |" in shown.out and "8/8" in shown.err
    before = len(run.server.requests)
    assert run() == 0 and len(run.server.requests) == before  # finished


def test_both_in_one_prompt(run, tmp_path: Path) -> None:
    run.server.model = says_of_two
    assert run("--pair_mode", "one_prompt", name="r.txt") == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["pairs"]["two"]["scores"]["decoded"]
    # Right, right, wrong; of the tied one the first wins in both orders.
    assert {name: one["estimate"] for name, one in found.items()} == pytest.approx(
        {
            "accuracy": 2 / 3,
            "accuracy_half_ties": 2 / 3,
            "accuracy_three_way": 3 / 4,
            "tie_rate": 1 / 4,
            "swap_consistency": 3 / 4,
            "first_rate": 5 / 8,
            "unscored_rate": 0.0,
        }
    )
    asked = [TOKENIZER.decode(request["prompt"]) for request in run.server.requests]
    assert len(asked) == 8
    # The same file, judged otherwise, is another evaluation.
    assert run(name="t.txt") == 2


def test_pairs_beside_a_benchmark_and_by_subset(run, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    assert run("--benchmark", f"flask={tmp_path / 'a.jsonl'}", "--by_subset") == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["benchmarks"]) == ["flask"] and list(results["pairs"]) == ["two.easy", "two.hard", "average"]
    accuracies = [one["scores"]["expected"]["accuracy"]["estimate"] for one in results["pairs"].values()]
    assert accuracies == [1.0, 0.0, 0.5]
    assert results["benchmarks"]["flask"]["n"] == 6  # none of the pairs' judgements
    text = (tmp_path / "out/results.md").read_text()
    assert "FLASK r" in text and "| **average** | RAIL | 4 |" in text
    assert {p.name for p in (tmp_path / "out/plots").iterdir() if p.name.startswith("two")} == set()


def test_two_runs_on_pairs_are_compared(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--method", "one", out="one") == 0
    probs = dict(PROBS)
    try:
        PROBS["good"] = (0.9, 0.05, 0.01)
        assert run("--method", "two", "--seed", "1", out="two") == 0
    finally:
        PROBS.update(probs)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert evaluate.main(["--compare", *folders, "--output_dir", str(tmp_path / "c"), "--n_resamples", "40"]) == 0
    content = json.loads((tmp_path / "c/comparison.json").read_text())["comparisons"][0]
    found = content["pairs"]["two"]["expected/accuracy"]
    # Of the three with a preferred response the first run has two right, and the second, to which good is bad, two.
    assert content["benchmarks"] == {} and (found["estimate_a"], found["estimate_b"]) == pytest.approx((2 / 3, 2 / 3))
    assert "| two | RAIL | three-way ↑ | 4 |" in (tmp_path / "c/comparison.md").read_text()
    run.server.model = says_of_two
    assert run("--pair_mode", "one_prompt", name="r.txt", out="three") == 0
    capsys.readouterr()
    assert evaluate.main(["--compare", folders[0], str(tmp_path / "three")]) == 2
    assert "pairs are judged as {'two': 'scores'} in the first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": "1"}, "line 1, column 'preference': expected a, b, tie, got '1'"),
        ({"preference": None}, "line 1, column 'preference': expected a, b, tie, got None"),
        ({"response_b": None}, "line 1, column 'response_b': expected text, got None"),
        ({"group": []}, "line 1, column 'group': a group is text or a number"),
        ({"instruction": " "}, "line 1: template t needs the instruction"),
        ({"instruction": "a " * 5000}, "line 1: the prompt has"),
        ({"reference": "c"}, "line 1: template t has no place for the reference"),
    ],
)
def test_bad_pairs_are_named_and_can_be_left_out(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    write(tmp_path / "bad.jsonl", [{**PAIRS[0], **change}, PAIRS[1]])
    assert run(file="bad.jsonl") == 2
    assert message in capsys.readouterr().err
    assert run("--skip_bad_rows", file="bad.jsonl") == 0
    assert [row["row"] for row in lines(tmp_path / "out/predictions.jsonl")[1:]] == [2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tie_margin", "-1"), "the tie margin must not be negative"),
        (("--rubric", "nowhere.txt"), "--rubric nowhere.txt: "),
        (("--rubric", "Is it kind?"), "template t has no place for the rubric"),
        (("--group_key", "question"), "column 'question': no such column"),
        (("--pair_mode", "one_prompt"), "template t has no place for the rubric"),
        (("--pairs", "two=x"), "two benchmarks are named 'two'"),
    ],
)
def test_wrong_flags_are_named(run, capsys, flags: tuple[str, ...], message: str) -> None:
    assert run(*flags) == 2
    assert message in capsys.readouterr().err


def test_flags_of_pairs_need_pairs(capsys) -> None:
    assert evaluate.main(["--model", "m", "--benchmark", "x", "--output_dir", "o", "--by_subset"]) == 2
    assert "--by_subset is of pairs; give --pairs" in capsys.readouterr().err


def test_a_general_rubric_stands_in_where_the_template_asks_for_one(run, tmp_path: Path) -> None:
    assert run("--max_samples", "1", name="r.txt") == 0
    assert len(lines(tmp_path / "out/predictions.jsonl")) == 3
    write(tmp_path / "own.jsonl", [{**PAIRS[0], "rubric": "text"}])
    assert run(name="r.txt", file="own.jsonl", out="own") == 0
    lengths = [len(request["prompt"]) for request in run.server.requests]
    assert min(lengths[:2]) > max(lengths[2:])  # its own rubric is one word


def test_the_commands_of_the_readme_parse() -> None:
    text = (Path(__file__).parents[2] / "real_openrlhf/evals/README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", "")
    commands = [shlex.split(line)[3:] for line in blocks.splitlines() if "real_openrlhf.evaluate" in line]
    assert len(commands) == 3
    for words in commands:
        evaluate.check(evaluate.parse_args(words))
