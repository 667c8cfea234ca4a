"""Tables in the paper's layout, with words where there is no number."""

from __future__ import annotations

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.predictions import EvaluationError
from real_openrlhf.evals.results import Settings, compare, evaluate
from real_openrlhf.evals.tables import NamedResults, comparison_table, details_table, from_json, markdown, paper_table
from tests.helpers.predictions import make_prediction, make_predictions

SETTINGS = Settings(scale=ScoreScale.parse("1-5"), n_resamples=20)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_2_has_the_papers_columns_and_order() -> None:
    rows = [
        prediction
        for seed, name in enumerate(["stsb", "mt_bench", "feedback_bench"])
        for prediction in make_predictions(20, seed=seed, benchmark=name)
    ]
    results = evaluate(rows, SETTINGS)
    other = evaluate(make_predictions(20, benchmark="mt_bench"), SETTINGS)
    runs = [
        NamedResults(method="A|B", training="RL", results=results),
        NamedResults(method="C", training="", results=other),
    ]
    head, _, *lines = paper_table(runs).splitlines()
    assert cells(head) == [
        *("Method", "Training", "Inference"),
        *("FB Bench r", "ρ", "τ", "forced", "MT Bench r", "ρ", "τ", "forced"),
        *("stsb r", "ρ", "τ", "forced", "Average r", "ρ", "τ", "forced"),
    ]
    assert [line.count("| RAIL |") for line in lines] == [1, 0, 1, 0] and lines[0].startswith("| A\\|B | RL | RAIL |")
    found = {r.name: r.scores["expected"] for r in results.benchmarks}
    assert cells(lines[0].replace("\\|", "/"))[3] == f"{100 * found['feedback_bench']['pearson'].estimate:.1f}"
    assert cells(lines[0].replace("\\|", "/"))[8] == f"{100 * found['mt_bench']['spearman'].estimate:.1f}"
    # Benchmarks that a run has not judged stay empty.
    assert cells(lines[2])[3:7] == [""] * 4 and cells(lines[2])[7] != ""


def test_table_2_says_how_many_scores_were_forced() -> None:
    few = [make_prediction(i, label=1.0 + i % 5, benchmark="flask", forced=i == 0) for i in range(8)]
    none = [make_prediction(i, label=1.0 + i % 5, benchmark="own") for i in range(3)]
    head, _, *lines = paper_table(
        [NamedResults(method="m", training="", results=evaluate([*few, *none], SETTINGS))]
    ).splitlines()
    columns = [i for i, cell in enumerate(cells(head)) if cell == "forced"]
    # 1 of 8 and 0 of 3; the average is over benchmarks, whatever their sizes.
    assert [[cells(line)[i] for i in columns] for line in lines[:2]] == [["12.5%", "0.0%", "6.2%"]] * 2


def test_what_is_undefined_gets_a_note() -> None:
    rows = [make_prediction(i, 4.0, [0, 0, 0, 1 - i / 10, i / 10], 4.0 + i % 2) for i in range(4)]
    results = evaluate(rows, SETTINGS)
    text = paper_table([NamedResults(method="m", training="", results=results)])
    assert cells(text.splitlines()[2])[3:] == ["- (1)"] * 3 + ["0.0%"] and text.endswith(
        "(1) undefined: all labels are 4"
    )
    details = details_table(results)
    assert "| flask | RAIL | 4 | - (1) | - (1) | - (1) | 0." in details and "nan" not in details.lower()
    assert cells(details.splitlines()[2])[6].count("[") == 1


def test_a_single_group_has_no_interval_and_says_so() -> None:
    details = details_table(evaluate(make_predictions(10, group_size=10), SETTINGS))
    assert "(1) no interval: a single group of rows" in details and "[" not in details


def test_comparison_of_undefined_numbers() -> None:
    rows = [make_prediction(i, 4.0, [0, 0, 0, 1 - i / 10, i / 10]) for i in range(4)]
    text = comparison_table(compare(rows, rows, SETTINGS), "a", "b")
    assert "| flask | RAIL | r | 4 | undefined | undefined | undefined | undefined |" in text
    assert "| flask | RAIL | MAE ↓ | 4 |" in text and "| +0.000 | [+0.000, +0.000] |" in text


def test_markdown_and_wrong_json() -> None:
    assert markdown(["a", "b"], [["x", "1"]], n_text=1) == "| a | b |\n| :--- | ---: |\n| x | 1 |"
    for wrong in ({}, {"benchmarks": {"x": {}}, "average": None}, []):
        with pytest.raises(EvaluationError, match="these are no results"):
            from_json(wrong)
