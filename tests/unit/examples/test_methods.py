"""What stsb and mtbench share: flags of every cell, numbers against scipy, draws of prompts, what is done again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from examples.methods import data, judged, plan, report, run, tables
from examples.methods.plan import METHODS, RAFT, START, Cell
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.validate import validate
from real_openrlhf.data.row import DataError
from real_openrlhf.evals.results import Settings
from real_openrlhf.run.signals import EXIT_RESUME

EXAMPLES = {name: run.load_example(name) for name in run.EXAMPLES}
SIZES = [(name, size) for name, example in EXAMPLES.items() for size in example.sizes]
SCALE = ScoreScale.parse("0-5")
SETTINGS = Settings(scale=SCALE, n_resamples=200)


def place(folder: Path, device: str = "cpu") -> run.Place:
    return run.Place(model=folder / "model", output=folder / "out", results=folder / "results", device=device)


@pytest.mark.parametrize(("name", "size_name"), SIZES)
def test_every_cell_is_a_configuration_and_budgets_are_equal(name: str, size_name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    size = example.sizes[size_name]
    where = place(tmp_path, "cuda" if size_name == "gpu" else "cpu")
    budgets = set()
    for cell in plan.cells(dict.fromkeys(METHODS, size.rates[0]))[1:]:
        config = parse_args(run.train_flags(example, size, where, cell, seed=7), warmup=cell.name == RAFT)
        validate(config)
        assert config.real.score_scale == example.scale and config.train.seed == 7 and config.ckpt.load == "auto"
        if cell.name == RAFT:
            assert config.warmup.patience and config.ckpt.best_metric == "expected/pearson"
            assert config.data.prompt_dataset.endswith("sft.jsonl")
            continue
        assert config.actor.model_name_or_path == str(where.folder(RAFT, 7) / "model")
        assert config.real.beta == 1.0 and config.ckpt.best_metric is None and not config.real.filters_groups
        assert config.real.objective == cell.objective
        rollout = config.rollout
        budgets.add((config.train.max_steps, rollout.batch_size, rollout.n_samples_per_prompt, config.actor.adam.lr))
    assert len(budgets) == 1
    config = parse_args(run.judge_flags(example, size, where, tmp_path / "m", tmp_path / "f"))
    validate(config)
    assert config.train.max_steps == 0 and str(config.eval.dataset).count("=") == len(example.tests)


def test_lora_is_on_the_upper_layers_alone() -> None:
    targets = plan.last_layers(28, 8)["ds.lora.target_modules"]
    assert len(targets) == 14 and "28.self_attn.q_proj" in targets and "29.mlp.down_proj" in targets
    # peft compares the ends of names: "8.self_attn.q_proj" would not mean layer 28.
    assert not any("model.layers.27.self_attn.q_proj".endswith(f".{target}") for target in targets)


def test_the_plan_names_every_cell_once() -> None:
    size = replace(EXAMPLES["stsb"].sizes["gpu"], seeds=(0, 1), rates=(1e-6, 2e-6))
    planned = list(plan.all_cells(size))
    assert len(planned) == len(set(planned)) == 1 + 2 * 4 + 3
    assert [name for seed, name in planned if seed == 1] == [
        "raft", "standard_rl-1e-06", "term2_only-1e-06", "real-1e-06",
    ]  # fmt: skip


def test_short_rows_are_kept() -> None:
    rows = [{"prompt": "a b c", "response": "d"}, {"prompt": "a", "response": "d e"}]
    count = lambda text: len(text.split())  # noqa: E731
    assert data.short(rows, count, prompt=2) == rows[1:] and data.short(rows, count, response=1) == rows[:1]
    assert data.short(rows, count, prompt=None) == rows and data.short(rows, count, prompt=2, response=1) == []


def columns(rng: np.random.Generator, n: int, noise: float, labels: np.ndarray | None = None) -> dict[str, list[Any]]:
    label = rng.uniform(0, 5, n) if labels is None else labels
    score = np.clip(label + noise * rng.standard_normal(n), 0, 5)
    return {
        "row": list(range(n)),
        "group": [f"q{i // 3}" for i in range(n)],
        "label": [float(x) for x in label],
        "expected": [float(x) for x in score],
        "decoded": [float(round(x)) for x in score],
        "forced": [float(i < 3) for i in range(n)],
        "distribution": [[1 / 6] * 6 for _ in range(n)],
    }


def write_cells(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> dict[tuple[str, int], dict[str, Any]]:
    """All judges on the same rows; REAL has the least noise."""
    rng = np.random.default_rng(3)
    labels = rng.uniform(0, 5, 60)
    noise = {START: 4.0, RAFT: 2.0, "standard_rl-0.0002": 1.5, "term2_only-0.0002": 1.4, "real-0.0002": 0.7}
    titles = {cell.name: cell for cell in plan.cells(dict.fromkeys(METHODS, 2e-4))}
    written = {}
    (folder / "cells").mkdir(parents=True)
    for name, size in noise.items():
        for seed in seeds[:1] if name == START else seeds:
            cell = {"cell": name, "title": titles[name].title, "seed": seed, "rate": titles[name].rate, "seconds": 60.0}
            cell["tests"] = {"test": columns(rng, 60, size, labels)}
            cell["texts"] = [{"row": 0, "label": 2.0, "text": "Both `agree`.  Score: 2"}]
            if name != START:
                cell["curve"] = {"0": {"expected/pearson": 0.1}, "20": {"expected/pearson": 0.5}}
                cell["phases"] = {"train": {"times": 2, "mean": 1.5, "sum": 3.0}}
            (folder / "cells" / f"{name}-seed{seed}.json").write_text(json.dumps(cell))
            written[name, seed] = cell
    return written


def test_the_report_is_made_of_the_cells_of_the_named_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cells(tmp_path)
    report.main(["stsb", str(tmp_path)])
    assert capsys.readouterr().out.strip() == (tmp_path / "tables.md").read_text().strip()
    with pytest.raises(ValueError, match="has no cells"):
        report.main(["mtbench", str(tmp_path / "cells")])


def test_tables_say_what_the_cells_say(tmp_path: Path) -> None:
    cells = write_cells(tmp_path)
    text = tables.write_tables(EXAMPLES["stsb"], tmp_path)
    r = {
        key: stats.pearsonr(*(cell["tests"]["test"][k] for k in ("expected", "label"))).statistic
        for key, cell in cells.items()
    }
    row = next(line for line in text.splitlines() if line.startswith("| REAL | RAIL"))
    both = [r["real-0.0002", seed] for seed in (0, 1)]
    assert f"| {np.mean(both):.3f} |" in row and f"| {np.std(both, ddof=1):.3f} |" in row
    by_seed = [r["real-0.0002", seed] - r["standard_rl-0.0002", seed] for seed in (0, 1)]
    line = next(line for line in text.splitlines() if line.startswith("| Standard RL | +"))
    half = stats.t.ppf(0.975, 1) * np.std(by_seed, ddof=1) / np.sqrt(2)
    middle = np.mean(by_seed)
    assert f"{by_seed[0]:+.3f} {by_seed[1]:+.3f} | {middle - half:+.3f} to {middle + half:+.3f}" in line
    # The start is one model, which stands for both seeds.
    from_start = [r["real-0.0002", seed] - r[START, 0] for seed in (0, 1)]
    assert f"| Start | {np.mean(from_start):+.3f} | {from_start[0]:+.3f} {from_start[1]:+.3f}" in text
    assert "| REAL | 0: 0.100, 20: 0.500 |" in text and "train 1.5 (2)" in text
    assert "- label 2: `Both 'agree'. Score: 2`" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000 and (tmp_path / "tables.md").read_text() == text


def test_all_seeds_get_the_same_draws_of_prompts(tmp_path: Path) -> None:
    """Two seeds with the same judgements are as uncertain as one of them: prompts are the same ones."""
    write_cells(tmp_path)
    real = tables.load(tmp_path)[-1]
    twice = tables.Row(title=real.title, by_seed={0: real.by_seed[0], 1: real.by_seed[0]})
    key = ("expected", "pearson")
    one = tables.over_prompts([real], [0], "test", key, SETTINGS)
    assert tables.over_prompts([twice], [0, 1], "test", key, SETTINGS) == pytest.approx(one)
    assert tables.over_prompts([twice, twice], [0, 1], "test", key, SETTINGS) == pytest.approx((0.0, 0.0))
    other = json.loads(json.dumps(real.by_seed[0]))
    other["tests"]["test"]["label"][0] = 0.0
    with pytest.raises(ValueError, match="judged different rows"):
        tables.over_prompts([real, tables.Row(title="x", by_seed={0: other})], [0], "test", key, SETTINGS)


def test_a_row_without_a_score_is_left_out_and_counted(tmp_path: Path) -> None:
    write_cells(tmp_path, seeds=(0,))
    real = tables.load(tmp_path)[-1]
    test = real.by_seed[0]["tests"]["test"]
    for name in ("expected", "decoded", "distribution"):
        test[name][:6] = [None] * 6
    assert real.value(0, "test", ("", "invalid_rate"), SETTINGS) == pytest.approx(0.1)
    wanted = stats.pearsonr(test["expected"][6:], test["label"][6:]).statistic
    assert real.value(0, "test", ("expected", "pearson"), SETTINGS) == pytest.approx(wanted)
    lines = tables.metric_table([real], "test", SETTINGS, ("pearson",))
    # 3 of 60 after a forced anchor, 6 without a score.
    assert "| 0.050 | 0.100 |" in lines[-1]


def test_a_start_that_scores_nothing_and_a_constant_judge_are_shown_as_undefined(tmp_path: Path) -> None:
    written = write_cells(tmp_path)
    for name, value in ((START, None), (RAFT, 2.0)):
        cell = written[name, 0]
        test = cell["tests"]["test"]
        for column in ("expected", "decoded"):
            test[column] = [value] * 60
        test["distribution"] = [None] * 60
        (tmp_path / f"cells/{name}-seed0.json").write_text(json.dumps(cell))
    text = tables.write_tables(EXAMPLES["stsb"], tmp_path)
    rail = {
        title: next(x for x in text.splitlines() if x.startswith(f"| {title} | RAIL")) for title in ("Start", "RAFT")
    }
    assert rail["Start"].count("| – ") >= 8 and "| 1.000 | – | – to – | 1 |" in rail["Start"]
    assert rail["RAFT"].startswith("| RAFT | RAIL | – | – | – | ")
    assert "| Start | – | – – | – | – to – |" in text


def test_rates_without_a_choice_are_refused(tmp_path: Path) -> None:
    written = write_cells(tmp_path, seeds=(0,))
    other = {**written["real-0.0002", 0], "cell": "real-0.0004", "rate": 4e-4}
    (tmp_path / "cells/real-0.0004-seed0.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"learning rates \[0\.0002, 0\.0004\], and no rates\.json"):
        tables.load(tmp_path)
    chosen = {"standard_rl": 2e-4, "term2_only": 2e-4, "real": 4e-4}
    (tmp_path / "rates.json").write_text(json.dumps({"chosen": chosen, "dev_pearson": {"real": {"0.0002": 0.1}}}))
    assert tables.load(tmp_path)[-1].by_seed[0]["cell"] == "real-0.0004"


class Recorder(run.Runner):
    """Cells that are made of nothing, and fail where told to."""

    def __init__(self, *args: Any, fails: str = "") -> None:
        super().__init__(*args)
        self.made: list[tuple[str, int]] = []
        self.fails = fails

    def _train(self, cell: Cell, seed: int) -> None:
        self.made.append((cell.name, seed))
        if cell.name == self.fails:
            raise run.CellFailed(f"{cell.name} ended with exit code 1")
        folder = self.place.folder(cell.name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        pearson = {1e-6: 0.2, 5e-6: 0.6, 2e-5: 0.4}.get(cell.rate or 0, 0.1)
        lines = [{"step": 0, "phase": "eval", "eval/expected/pearson": 0.1, "seconds/evaluate": 2.0}]
        lines += [{"step": 9, "phase": "eval", "eval/expected/pearson": pearson, "seconds/evaluate": 4.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _judge(self, cell: Cell, seed: int) -> dict[str, Any]:
        return {"tests": {"test": columns(np.random.default_rng(0), 12, 1.0)}, "texts": []}


def recorder(folder: Path, size: str, **options: Any) -> Recorder:
    example = EXAMPLES["stsb"]
    return Recorder(example, example.sizes[size], place(folder), None, **options)


def test_cells_are_made_once_and_the_rate_is_searched_on_the_first_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = recorder(tmp_path, "gpu")
    assert run.run_all(runner) == []
    # 3 RAFT, 9 of the search, and 3 methods of the other two seeds.
    assert len(runner.made) == len(set(runner.made)) == 3 + 9 + 6
    assert [name for name, seed in runner.made if seed == 2] == ["raft", *(f"{name}-5e-06" for name in METHODS)]
    found = json.loads((tmp_path / "results/rates.json").read_text())
    assert found["chosen"] == dict.fromkeys(METHODS, 5e-6) and found["dev_pearson"]["real"]["2e-05"] == 0.4
    cell = json.loads((tmp_path / "results/cells/real-5e-06-seed2.json").read_text())
    assert cell["curve"]["9"]["expected/pearson"] == 0.6
    assert cell["phases"]["evaluate"] == {"times": 2, "mean": 3.0, "sum": 6.0}
    said = capsys.readouterr().out
    assert "[1/19] start of seed 0" in said and "[19/19] real-5e-06 of seed 2" in said
    assert run.main(["stsb", "--size", "gpu", "--list", "--results", str(tmp_path / "results")]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 19 and all(line.endswith(": done") for line in listed)
    again = recorder(tmp_path, "gpu")
    assert run.run_all(again) == [] and again.made == []


def test_a_method_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    runner = recorder(tmp_path, "cpu", fails="standard_rl-0.0002")
    (failure,) = run.run_all(runner)
    assert "exit code 1" in failure and (tmp_path / "results/cells/real-0.0002-seed0.json").is_file()
    with pytest.raises(run.CellFailed):
        run.run_all(recorder(tmp_path / "other", "cpu", fails="raft"))


def test_data_of_another_size_are_not_taken(tmp_path: Path) -> None:
    made: list[list[str]] = []
    example = replace(EXAMPLES["mtbench"], prepare=lambda words: made.append(list(words)))
    where = place(tmp_path)
    where.data.mkdir(parents=True)
    run.prepare(example, example.sizes["cpu"], where, Path("/d"))
    run.prepare(example, example.sizes["cpu"], where, Path("/d"))
    assert len(made) == 1 and made[0][-2:] == ["--data_dir", "/d"] and str(where.model) in made[0]
    with pytest.raises(DataError, match="prepared for another size"):
        run.prepare(example, example.sizes["gpu"], where, Path("/d"))


def test_what_is_kept_of_an_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    folder.mkdir()
    row = {"benchmark": "test", "row": 4, "group": "q", "label": 3.5, "expected": 3.123456, "decoded": 3.0,
           "forced": 1.0, "distribution": [0.123456, None], "text": "t", "mass": 1.0}  # fmt: skip
    (folder / "step_2.jsonl").write_text(json.dumps({**row, "row": 1}) + "\n")
    (folder / "step_10.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "benchmark": "b"}) + "\n")
    found = judged.judged_tests(tmp_path)
    assert list(found) == ["test", "b"] and found["test"]["row"] == [4]
    assert found["test"]["expected"] == [3.1235] and found["test"]["distribution"] == [[0.1235, None]]
    (p,) = judged.predictions(found["test"], "x")
    assert (p.key, p.label, p.invalid_share, p.forced_share) == (("x", 4), 3.5, 0.0, 1.0)
    with pytest.raises(FileNotFoundError, match="no evaluation"):
        judged.judged_tests(tmp_path / "none")


class Cluster:
    def close(self) -> None: ...


def test_logs_of_cells_whose_names_hold_a_rate_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES["stsb"]
    size = replace(example.sizes["gpu"], keep_engines=False)
    runner = run.Runner(example, size, place(tmp_path), Cluster())  # type: ignore[arg-type]
    monkeypatch.setattr(run, "run", lambda config, kept: print(config.ckpt.output_dir) or 1)
    for name in ("real-0.0002", "real-0.0004"):
        folder = tmp_path / name
        flags = run.judge_flags(example, size, place(tmp_path), tmp_path / "m", folder)
        with pytest.raises(run.CellFailed, match=rf"{name} ended with exit code 1; see .*{name}\.log"):
            runner._run(flags, folder)
        assert (tmp_path / f"{name}.log").read_text().strip().endswith(name)
    # A signal ends the whole command, not one cell.
    monkeypatch.setattr(run, "run", lambda config, kept: EXIT_RESUME)
    with pytest.raises(SystemExit) as caught:
        runner._run(flags, folder)
    assert caught.value.code == EXIT_RESUME


def test_wrong_words_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["stsb", "--model", str(tmp_path)]) == 2
    assert "get_model.py gets one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["stsb", "--size", "huge"])
    assert "--size huge: stsb has tiny, cpu, gpu" in capsys.readouterr().err
    assert run.main(["mtbench", "--list", "--results", str(tmp_path)]) == 0
    assert "real-0.0002 of seed 0: to do" in capsys.readouterr().out
