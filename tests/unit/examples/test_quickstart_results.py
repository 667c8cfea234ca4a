"""The quickstart's README says what its committed JSON says, and the claim beside it holds in every run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3] / "examples/quickstart"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_repeat", ROOT / "repeat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = json.loads((ROOT / "results/exact.json").read_text(encoding="utf-8"))


def test_the_tables_of_readme_are_those_of_the_json() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in load().table(RESULTS).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 9 + 2 + 3
    assert [line for line in rows if line not in readme] == []


def test_what_is_claimed_of_all_runs_holds_in_all() -> None:
    assert {(row["seed"], row["repeat"]) for row in RESULTS["runs"]} == {(s, r) for s in range(3) for r in range(3)}
    for row in RESULTS["runs"]:
        first, last = row["evaluations"][0], row["evaluations"][-1]
        assert (first["step"], last["step"]) == (0, 50)
        assert last["expected/pearson"] > first["expected/pearson"] and last["reward"] > first["reward"], row
        assert last["expected/rmse"] < first["expected/rmse"] and last["mass"] > first["mass"] - 1e-4, row


def test_gains_and_their_spread_on_numbers() -> None:
    def run(seed: int, repeat: int, pearson: float, reward: float) -> dict[str, Any]:
        ends = [(0, 0.5, -2.0), (50, pearson, reward)]
        names = ("step", "expected/pearson", "reward")
        evaluations = [{**dict(zip(names, end)), "expected/rmse": 1.0, "mass": 0.9} for end in ends]
        return {"seed": seed, "repeat": repeat, "evaluations": evaluations, "seconds": 1.0}

    text = load().table({"command": "c", "runs": [run(4, 0, 0.6, -1.0), run(4, 1, 0.8, -3.0)]})
    assert "| 4 | 2 | 0.500 to 0.800 | 1.000 to 1.000 | 0.900 to 0.900 | -2.000 to -3.000 |" in text
    assert "| 4 | 2 | +0.200 [+0.100, +0.300] | +0.000 [-1.000, +1.000] |" in text
