"""Cells of the paper's tables on the real stack: several runs on one engine, and what is kept of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.paper_tables import cells as plan
from examples.paper_tables.cells import SIZES
from examples.paper_tables.run import CellFailed, Cluster, Place, Runner

pytestmark = pytest.mark.integration
REAL = plan.rl("real", 1e-3, start="sft")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """After the cells sft and REAL from it."""
    folder = tmp_path_factory.mktemp("tables")
    place = Place(size="tiny", output=folder / "models", results=folder / "results")
    cluster = Cluster(folder / "cluster.log")
    runner = Runner(place, SIZES["tiny"], cluster)
    try:
        runner.cell(plan.warmup("sft"), 0)
        first = cluster.engines()._engines
        runner.cell(REAL, 0)
        assert first is not None and cluster.engines()._engines is first
        with pytest.raises(CellFailed, match="exit code 2; see"):
            runner.cell(replace(REAL, name="wrong", flags={**REAL.flags, "rollout.batch_size": 10_000}), 0)
    finally:
        cluster.close()
    return runner


def evaluation(folder: Path, step: int) -> list[dict[str, Any]]:
    lines = (folder / "eval" / f"step_{step}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_cell_keeps_its_judgements(runner: Runner) -> None:
    cell = json.loads(runner.place.json(REAL, 0).read_text(encoding="utf-8"))
    rows = evaluation(runner.place.seed(0) / REAL.name, 2)
    kept = [value for columns in cell["judged"].values() for value in columns["expected"]]
    assert cell["steps"] == 2 and len(rows) == 5 * 8
    assert kept == [None if row["expected"] is None else round(row["expected"], 4) for row in rows]
    # It begins where the warm-up ended, judged by the same engine after another training.
    sft = json.loads(runner.place.json(plan.warmup("sft"), 0).read_text(encoding="utf-8"))
    assert cell["before"]["judged"] == sft["judged"] != sft["before"]["judged"]
    # Done is done: without a cluster.
    assert runner.cell(REAL, 0) == cell


@pytest.mark.slow
def test_a_kept_engine_gives_what_a_new_one_gives(runner: Runner, tmp_path: Path) -> None:
    folder = runner.place.seed(0)
    flags = runner._flags(REAL, 0, folder / "sft/model", tmp_path / "out")
    command = [sys.executable, "-m", "real_openrlhf.train_real", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    assert evaluation(tmp_path / "out", 2) == evaluation(folder / REAL.name, 2)
    assert evaluation(tmp_path / "out", 0) != evaluation(tmp_path / "out", 2)
