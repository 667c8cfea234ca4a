"""The quickstart's README says what its committed JSON says, and the claim made with it holds in every run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.config.cli import parse_args

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples/quickstart"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_repeat", FOLDER / "repeat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


repeat = load()
README = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
RESULTS = {
    name: json.loads((FOLDER / f"results/{name}.json").read_text(encoding="utf-8"))
    for name in ("rubric", "rubric_50", "facts")
}
RUBRIC = RESULTS["rubric"]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_the_table_of_the_nine_runs_is_that_of_the_json(preset: str) -> None:
    table = rows(repeat.table(RUBRIC, preset))
    assert len(table) == 2 + 9 + 2 + 3
    assert [line for line in table if line not in README] == []


@pytest.mark.parametrize("name", RESULTS)
def test_the_grid_is_that_of_the_json(name: str) -> None:
    table = rows(repeat.grid(RESULTS[name]))
    assert len(table) == 2 + len(RESULTS[name]["cells"])
    assert [line for line in table if line not in README] == []
    assert [command for command in RESULTS[name]["commands"] if f"    {command}" not in README] == []


def test_every_cell_of_the_json_is_one_of_the_script_and_its_flags_parse() -> None:
    for results in RESULTS.values():
        for cell, flags in results["cells"].items():
            assert list(repeat.CELLS[cell]) == flags
    for flags in repeat.CELLS.values():
        for task in repeat.TASKS.values():
            parse_args(["--config", str(task.config), *repeat.MEASURED, *flags])


def test_what_is_claimed_of_all_runs_holds_in_all() -> None:
    """Pearson up by more than a seed's runs lie apart, reward up, RMSE down, mass held."""
    runs = [row for row in RUBRIC["runs"] if row["cell"] == "exact"]
    assert {(row["seed"], row["repeat"]) for row in runs} == {(s, r) for s in range(3) for r in range(3)}
    for seed in range(3):
        mine = [row["evaluations"] for row in runs if row["seed"] == seed]
        ends = [e[-1]["test/expected/pearson"] for e in mine]
        for first, *_, last in mine:
            assert (first["step"], last["step"]) == (0, RUBRIC["steps"]) == (0, 100)
            assert last["test/expected/pearson"] - first["test/expected/pearson"] > max(ends) - min(ends)
            assert last["test/reward"] > first["test/reward"] and last["test/mass"] > 0.99
            assert last["test/expected/rmse"] < first["test/expected/rmse"]


def test_what_is_said_of_exact_against_paper() -> None:
    ends = {(r["cell"], r["seed"], r["repeat"]): r["evaluations"][-1] for r in RUBRIC["runs"]}
    pairs = [(ends["exact", s, r], ends["paper", s, r]) for s in range(3) for r in range(3)]
    for metric, sign, mean in (("expected/pearson", 1, "0.018"), ("expected/rmse", -1, "0.021")):
        better = [sign * (a[f"test/{metric}"] - b[f"test/{metric}"]) for a, b in pairs]
        assert sum(x > 0 for x in better) == 8 and f"{sum(better) / 9:.3f}" == mean
    assert min(e["test/mass"] for pair in pairs for e in pair) > 0.99


def test_the_front_page_has_the_same_numbers() -> None:
    line = next(
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "results/rubric.json" in line
    )
    for seed in range(3):
        mine = [row["evaluations"] for row in RUBRIC["runs"] if (row["cell"], row["seed"]) == ("exact", seed)]
        first = mine[0][0]["test/expected/pearson"]
        low, middle, high = sorted(e[-1]["test/expected/pearson"] for e in mine)
        assert f"seed {seed}: {first:.3f} to {low:.3f}, {middle:.3f} and {high:.3f}" in line
    report = (FOLDER / "results/seed_0.md").read_text(encoding="utf-8").splitlines()
    *_, difference, interval, _ = next(row for row in report if row.startswith("| pearson | E[score]")).split("|")
    assert f"{difference.strip()} {interval.strip()}" in line


def test_the_committed_report_is_the_run_of_the_table() -> None:
    report = (FOLDER / "results/seed_0.md").read_text(encoding="utf-8")
    row = next(r for r in RUBRIC["runs"] if (r["cell"], r["seed"], r["repeat"]) == ("exact", 0, 0))
    last = row["evaluations"][-1]
    cells = [line.split("|")[4].strip() for line in report.splitlines() if line.startswith(("| mean reward", "| rmse"))]
    assert cells[:2] == [f"{last['test/reward']:.3f}", f"{last['test/expected/rmse']:.3f}"]


def test_the_quickstart_runs_with_the_flags_that_were_measured() -> None:
    script = re.sub(r"\\\n\s*", " ", (FOLDER / "run.sh").read_text(encoding="utf-8"))
    words = " ".join(script.replace('"', "").split())
    flags = " ".join(repeat.WARMUP).split(" --")
    assert [flag for flag in flags if flag.removeprefix("--").strip() not in words] == []
    assert "train_real --config examples/quickstart/config.yaml" in words
    assert repeat.TASKS["rubric"].config == FOLDER / "config.yaml"
    # What the results of config.yaml's commit and of the flags before it have in common: every flag of the file.
    config = parse_args(["--config", str(FOLDER / "config.yaml")])
    assert (config.rollout.batch_size, config.rollout.n_samples_per_prompt, config.rollout.max_new_tokens) == (
        16,
        8,
        32,
    )
    assert (config.actor.adam.lr, config.train.micro_batch_size, config.real.keep_groups) == (2e-4, 32, "all")
    assert (config.real.anchor, config.data.max_len, config.eval.steps) == (("score ",), 128, 25)
    assert config.train.full_determinism_enable and config.ckpt.best_metric_key == "valid/expected/pearson"


def test_gains_and_their_spread_on_numbers() -> None:
    def run(seed: int, number: int, pearson: float, reward: float, cell: str = "exact") -> dict[str, Any]:
        evaluations = [
            {"step": step, **{f"{s}/{n}": v for s in ("valid", "test") for n, v in zip(repeat.METRICS, values)}}
            for step, values in ((0, (0.5, 1.0, 0.9, -2.0)), (50, (pearson, 1.0, 0.8, reward)))
        ]
        norms = [{"step": 1, "term1": 6.0, "term2": 2.0, "cosine": 0.0}, {"step": 2, "term1": 1.0, "term2": 0.0}]
        return {"cell": cell, "seed": seed, "repeat": number, "evaluations": evaluations, "norms": norms}

    runs = [run(4, 0, 0.6, -1.0), run(4, 1, 0.8, -3.0), run(4, 0, 0.1, -9.0, cell="paper")]
    results = {"cells": {"exact": [], "paper": [], "beta_0.1": []}, "runs": runs}
    text = repeat.table(results, "exact")
    assert "| 4 | 2 | 0.500 to 0.800 | 1.000 to 1.000 | 0.900 to 0.800 | -2.000 to -3.000 |" in text
    assert "| 4 | 2 | +0.200 [+0.100, +0.300] | +0.000 [-1.000, +1.000] |" in text
    first, second = rows(repeat.grid(results))[2:]
    assert (
        first
        == "| `exact` | 2 | +0.200 [+0.100, +0.300] | +0.000 [-1.000, +1.000] | +0.000 [+0.000, +0.000] | 0.800 | 3 |"
    )
    assert second == "| `paper` | 1 | -0.400 | -7.000 | +0.000 | 0.800 | 3 |"
