"""What a run says when it is done."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.controller.output_folder import LIBRARIES_FILE
from real_openrlhf.export.settings import JudgeSettings
from real_openrlhf.run.ending import ending, evaluations_of, table


def record(step: int, pearson: float | None, reward: float = -1.0, phase: str = "eval") -> dict[str, Any]:
    return {"step": step, "phase": phase, "eval/expected/pearson": pearson, "eval/reward": reward}


def plan_of(folder: Path, wandb: str = "disabled") -> Any:
    config = SimpleNamespace(
        ckpt=SimpleNamespace(output_dir=str(folder)), logger=SimpleNamespace(wandb=SimpleNamespace(mode=wandb))
    )
    return SimpleNamespace(config=config, model_folder=folder / "model")


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_the_file_of_what_libraries_said_is_named(tmp_path: Path) -> None:
    assert "libraries" not in ending(plan_of(tmp_path))
    (tmp_path / LIBRARIES_FILE).touch()
    assert f"what libraries said: {tmp_path / LIBRARIES_FILE}\n" in ending(plan_of(tmp_path))


def test_the_table_on_numbers() -> None:
    lines = table([record(0, 0.5, -2.0), record(10, 0.75, -1.5), record(20, 0.7, -1.25)], exported=10)
    assert [line.split() for line in lines] == [
        ["held", "out", "step", "0", "step", "20", "exported,", "step", "10"],
        ["reward", "of", "REAL", "-2.0000", "-1.2500", "-1.5000"],
        ["Pearson", "of", "E[score]", "0.5000", "0.7000", "0.7500"],
    ]
    # The last weights were exported, or it is not known which: no third column.
    for exported in (20, None):
        assert table([record(0, None), record(20, 0.7)], exported)[0].split() == [
            "held",
            "out",
            "step",
            "0",
            "step",
            "20",
        ]
    assert "undefined" in table([record(0, None), record(20, 0.7)], 20)[2]


def test_only_evaluations_count_and_the_last_of_a_step(tmp_path: Path) -> None:
    write(tmp_path, [record(0, 0.1), record(1, 0.2, phase="train"), record(5, 0.3), record(5, 0.4)])
    assert [(r["step"], r["eval/expected/pearson"]) for r in evaluations_of(tmp_path / "metrics.jsonl")] == [
        (0, 0.1),
        (5, 0.4),
    ]
    assert evaluations_of(tmp_path / "none.jsonl") == []


def test_a_run_ends_with_its_table_its_plot_and_the_next_commands(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    (folder / "model").mkdir(parents=True)
    JudgeSettings(scale=ScoreScale.parse("1-3"), anchors=("a ",), end_ids=(1,), step=5).save(folder / "model")
    write(folder, [record(0, 0.1), record(5, 0.4), record(9, 0.3)])
    text = ending(plan_of(folder, wandb="offline"))
    assert text.startswith(f"the judge is in {folder}/model") and "exported, step 5" in text
    assert f"judge --model '{folder}/model' --input" in text and f"wandb sync '{folder}/wandb'/offline-run-*" in text
    with Image.open(folder / "learning_curve.png") as image:
        assert image.width > 500


def test_without_an_evaluation_there_is_no_table(tmp_path: Path) -> None:
    text = ending(plan_of(tmp_path))
    assert "held out" not in text and "wandb" not in text and "next:" in text
    assert not (tmp_path / "learning_curve.png").exists()
