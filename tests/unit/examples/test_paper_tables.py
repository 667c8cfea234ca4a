"""The paper's tables: every cell's flags are accepted, numbers are scipy's, tables say what the cells' JSON says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from examples.judging_task import warm_up
from examples.judging_task.task import TESTS
from examples.paper_tables import cells as plan
from examples.paper_tables import judged, run, tables
from examples.paper_tables.cells import SIZES, Cell
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.validate import validate

RESULTS = Path(run.HERE) / "results"
RATES = {"real": 1e-4, "standard_rl": 2e-4, "jepo": 4e-4}


def all_cells() -> list[Cell]:
    found = [cell for cells in plan.search(SIZES["small"]).values() for cell in cells]
    return found + [cell for table in plan.tables(RATES).values() for cell in table.values()]


def test_a_name_means_one_cell() -> None:
    by_name: dict[str, Cell] = {}
    for cell in all_cells():
        assert by_name.setdefault(cell.name, cell) == cell
    # 3 warm-ups, 12 of the search, of which 3 are the main cells, and 2 + 4 + 2 + 3 + 3 + 3 + 1 of the other tables.
    assert len(by_name) == 33


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", {cell.name: cell for cell in all_cells()}.values(), ids=lambda cell: cell.name)
def test_every_cell_is_a_configuration(cell: Cell, size: str, tmp_path: Path) -> None:
    place = run.Place(size=size, output=tmp_path, results=tmp_path)
    runner = run.Runner(place, SIZES[size], cluster=None)  # type: ignore[arg-type]
    flags = runner._flags(cell, 0, tmp_path / "model", tmp_path / "out")
    config = parse_args(flags, warmup=cell.warmup)
    validate(config)
    wanted = SIZES[size]
    if cell.name.endswith(("-n4", "-n10")):
        assert config.train.max_steps == 0
        return
    rollouts = config.rollout.batch_size * config.rollout.n_samples_per_prompt
    assert rollouts == 128 or cell.warmup
    assert config.train.max_steps == (wanted.warmup_steps if cell.warmup else wanted.steps)
    rows = wanted.warmup_rows * config.train.num_episodes if cell.warmup else 8192 * config.train.num_episodes
    per_step = 64 if cell.warmup else config.rollout.batch_size
    assert rows >= per_step * (config.train.max_steps or 0)


def columns(rng: np.random.Generator, n: int, noise: float) -> dict[str, list[Any]]:
    label = rng.integers(1, 6, n)
    score = label + noise * rng.standard_normal(n)
    return {
        "row": list(range(n)),
        "label": [float(x) for x in label],
        "expected": [float(x) for x in score],
        "decoded": [float(round(x)) for x in score],
    }


def test_a_cell_is_read_from_its_evaluations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (output / "eval").mkdir(parents=True)
    task_row = {"tags": ["L01", "L02"], "tally": 1}
    written = {}
    for step in (0, 10, 2):
        lines = []
        for split in judged.SPLITS:
            (data / f"{split}.jsonl").write_text((json.dumps(task_row) + "\n") * 30)
            written[step, split] = columns(rng, 30, 1.0)
            for i in range(30):
                row = {name: values[i] for name, values in written[step, split].items()}
                text = "L01 echoes +1 score 3" if i < 15 else "L01 echoes +0 L02 irony +1 score 2"
                lines.append({"benchmark": split, "text": text, **row})
        (output / "eval" / f"step_{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = judged.judged_cell(output, data)
    assert found["steps"] == 10 and list(found["curve"]) == ["0", "2", "10"]

    def mean_r(step: int, reading: str) -> float:
        pairs = [(written[step, split][reading], written[step, split]["label"]) for split in TESTS]
        return float(np.mean([stats.pearsonr(x, y).statistic for x, y in pairs]))

    assert found["average"]["expected"]["pearson"] == pytest.approx(mean_r(10, "expected"), abs=1e-4)
    assert found["average"]["decoded"]["pearson"] == pytest.approx(mean_r(10, "decoded"), abs=1e-9)
    assert found["curve"]["2"]["expected"]["pearson"] == pytest.approx(mean_r(2, "expected"), abs=1e-4)
    assert found["before"]["judged"]["valid"]["label"] == written[0, "valid"]["label"]
    # Half of the rows name one line of two; the tally is right in all.
    assert found["feedback"]["test_id"] == {"lines_read": 0.75, "tally_right": 1.0}


def test_the_rate_with_the_best_score_is_chosen() -> None:
    assert judged.chosen_rate({"0.0001": 0.3, "0.0002": 0.5, "0.0004": None}) == 2e-4
    with pytest.raises(ValueError, match="no learning rate"):
        judged.chosen_rate({"0.0001": None})


def write_cells(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Three seeds of RAFT, standard RL and REAL, REAL with the least noise."""
    rng = np.random.default_rng(1)
    (folder / "cells").mkdir(parents=True)
    noise = {"raft": 2.0, plan.rl("standard_rl", 2e-4).name: 1.5, plan.rl("real", 1e-4).name: 0.7}
    for seed in (0, 1, 2):
        # The same rows and labels for all cells of a seed.
        labels = {split: columns(rng, 60, 0.0) for split in judged.SPLITS}
        for name, size in noise.items():
            found = {}
            for split, base in labels.items():
                score = [y + size * float(rng.standard_normal()) for y in base["label"]]
                found[split] = {**base, "expected": score}
            cell = {
                "cell": name,
                "seed": seed,
                "judged": found,
                "before": {"judged": labels},
                "average": judged.average({s: judged.scores(found[s]) for s in TESTS}),
                "curve": {
                    step: judged.average({s: judged.scores(each[s]) for s in TESTS})
                    for step, each in (("0", found), ("5", labels), ("9", found))
                },
                "valid_curve": {
                    step: judged.scores(each["valid"]) for step, each in (("0", found), ("5", labels), ("9", found))
                },
                "feedback": {split: {"lines_read": 0.5, "tally_right": 0.25} for split in judged.SPLITS},
            }
            (folder / "cells" / f"{name}-seed{seed}.json").write_text(json.dumps(cell))
    search = {"valid_pearson": {name: {str(rate): 0.5} for name, rate in RATES.items()}, "chosen": RATES}
    (folder / "rates.json").write_text(json.dumps(search))
    return tables.load(folder)


def line_of(markdown: str, start: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_2_is_what_scipy_finds(tmp_path: Path) -> None:
    cells = write_cells(tmp_path)
    markdown = tables.write_tables(tmp_path)
    real, binary = cells[plan.rl("real", 1e-4).name], cells[plan.rl("standard_rl", 2e-4).name]

    def of(cell: dict[str, Any]) -> float:
        splits = [cell["judged"][split] for split in TESTS]
        return float(np.mean([stats.pearsonr(s["expected"], s["label"]).statistic for s in splits]))

    values = np.array([of(real[seed]) for seed in (0, 1, 2)])
    found = line_of(markdown, "| REAL | RAIL |")
    assert found[6] == f"{values.mean():.3f}" and found[11] == f"{values.std(ddof=1):.3f}"
    low, high = map(float, found[12].split(" to "))
    assert low < values.mean() < high and high - low < 0.2
    less = values - [of(binary[seed]) for seed in (0, 1, 2)]
    table = markdown[markdown.index("| REAL less |") :].splitlines()
    row = line_of("\n".join(table[: table.index("")]), "| Standard RL |")
    interval = stats.t.interval(0.95, 2, loc=less.mean(), scale=less.std(ddof=1) / math.sqrt(3))
    assert row[1] == f"{less.mean():+.3f}" and row[2].split() == [f"{x:+.3f}" for x in less]
    assert row[3] == f"{interval[0]:+.3f} to {interval[1]:+.3f}"
    low, high = (float(x) for x in row[4].split(" to "))
    assert low < less.mean() < high
    start = markdown.index("if validation had chosen")
    stopped = line_of(markdown[start : markdown.index("###", start)], "| REAL |")
    best = np.mean([cell["curve"]["5"]["expected"]["pearson"] for cell in real.values()])
    assert best > values.mean() and stopped[1] == f"{best:.3f}" and stopped[3].count(" (5)") == 3
    assert stopped[2] == f"{values.mean():.3f}" and stopped[4].split() == [f"{value:.3f}" for value in values]
    assert (tmp_path / "figure_2.png").stat().st_size > 5000 and (tmp_path / "tables.md").read_text() == markdown


def test_judges_of_different_rows_are_not_compared(tmp_path: Path) -> None:
    write_cells(tmp_path)
    path = tmp_path / "cells" / f"{plan.rl('real', 1e-4).name}-seed0.json"
    cell = json.loads(path.read_text())
    cell["judged"]["test_id"]["row"][0] = 99
    path.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="judged different rows"):
        tables.write_tables(tmp_path)


@pytest.mark.skipif(not (RESULTS / "small/rates.json").is_file(), reason="no results are committed")
def test_the_committed_tables_are_those_of_the_committed_cells(tmp_path: Path) -> None:
    (tmp_path / "cells").symlink_to(RESULTS / "small/cells")
    (tmp_path / "rates.json").symlink_to(RESULTS / "small/rates.json")
    assert tables.write_tables(tmp_path) == (RESULTS / "small/tables.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("losses", "made"), [([0.05], [8]), ([0.3, 0.05], [8, 16]), ([0.3, 0.2, 0.1], [8, 16, 32])])
def test_a_base_that_does_not_read_is_made_anew_with_more_updates(tmp_path, monkeypatch, losses, made):
    size, seen, left = replace(SIZES["small"], base_steps=8), [], list(losses)

    def train(folder, name, *, model, data, stage, seed):
        assert not (folder / name).exists() and (model, data, seed) == ("init", "sft_careful", 5)
        seen.append(int(stage[stage.index("--max_steps") + 1]))
        (folder / name).mkdir()
        (folder / name / "warmup_metrics.jsonl").write_text(f'{{"loss": 9}}\n{{"loss": {left.pop(0)}}}\n')

    monkeypatch.setattr(warm_up, "train", train)
    run.teach_base(tmp_path, 5, size)
    run.teach_base(tmp_path, 5, size)
    assert seen == made
    assert json.loads((tmp_path / "base.json").read_text()) == {str(n): x for n, x in zip(made, losses, strict=True)}


def test_a_base_that_never_reads_ends_the_run(tmp_path, monkeypatch):
    def train(folder, name, **_):
        (folder / name).mkdir()
        (folder / name / "warmup_metrics.jsonl").write_text('{"loss": 0.3}\n')

    monkeypatch.setattr(warm_up, "train", train)
    with pytest.raises(RuntimeError, match=r"the base of seed 5 does not read.*'3200': 0.3"):
        run.teach_base(tmp_path, 5, SIZES["small"])
