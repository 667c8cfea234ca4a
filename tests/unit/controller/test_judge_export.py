"""Which weights become the judge, and that they are the ones that were judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.controller.judge_export import Chosen, JudgeExport


class Policy:
    """Its weights are a number."""

    weights = 0
    full = False
    saved = 0

    def save_model(self, path: str, complete: Callable[[Path], None]) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.saved += 1
        Path(path).mkdir(parents=True)
        (Path(path) / "weights").write_text(str(self.weights))
        complete(Path(path))


class Run:
    """metric(step) is what the evaluation after that step gives; weights are the step."""

    def __init__(self, folder: Path, metric: str | None = "expected/pearson") -> None:
        self.folder, self.policy = folder, Policy()
        self.export = JudgeExport(
            self.policy, folder / "model", metric=metric, describe=self._describe, step_of=self._step_of
        )

    def _describe(self, folder: Path, chosen: Chosen) -> None:
        (folder / "card").write_text(f"{chosen.step}: {chosen.why}")

    def _step_of(self, folder: Path) -> int | None:
        path = folder / "weights"
        return int(path.read_text()) if path.exists() else None

    def evaluate(self, step: int, **metrics: float | None) -> None:
        self.policy.weights = step
        self.export.evaluated(step, {name.replace("__", "/"): value for name, value in metrics.items()})

    def finish(self, step: int, **metrics: float | None) -> tuple[str, str]:
        self.policy.weights = step
        self.export.finish(step, {name.replace("__", "/"): value for name, value in metrics.items()})
        assert [path.name for path in self.folder.iterdir()] == ["model"]
        card = self.folder / "model/card"
        return (self.folder / "model/weights").read_text(), card.read_text() if card.exists() else ""


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.5, 0.6, 0.7], 2),
        ([0.5, 0.7, 0.6], 1),
        ([0.7, 0.6, 0.5], 0),
        # As good is not better: the earlier stays.
        ([0.5, 0.7, 0.7], 1),
        ([None, 0.4, None], 1),
    ],
)
def test_the_best_evaluation_decides(values: list[float | None], best: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, value in enumerate(values):
        run.evaluate(step * 10, expected__pearson=value, mass=0.9)
    weights, card = run.finish(25)
    assert weights == str(best * 10)
    n = sum(value is not None for value in values)
    assert card == (
        f"{best * 10}: step {best * 10}, the best of {n} evaluations by expected/pearson ({values[best]:.4f}); "
        "training went on to step 25"
    )
    assert run.export.chosen.evaluation == {"expected/pearson": values[best], "mass": 0.9}


def test_a_metric_that_should_be_low(tmp_path: Path) -> None:
    run = Run(tmp_path, metric="expected/rmse")
    for step, value in enumerate([0.5, 0.4, 0.6]):
        run.evaluate(step, expected__rmse=value)
    assert run.finish(2)[0] == "1"


@pytest.mark.parametrize("metric", [None, "expected/pearson"])
def test_without_an_evaluation_the_last_weights_are_exported(metric: str | None, tmp_path: Path) -> None:
    run = Run(tmp_path, metric=metric)
    run.evaluate(0, expected__pearson=None)
    assert run.policy.saved == 0
    assert run.finish(7, mass=0.5)[0] == "7"
    assert run.export.chosen.step == 7 and run.export.chosen.evaluation == {"mass": 0.5}
    assert run.export.chosen.why.startswith("the last ones")


def test_one_export_beside_the_judge_at_a_time(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step, value in enumerate([0.1, 0.2, 0.15, 0.3]):
        run.evaluate(step, expected__pearson=value)
        assert [path.name for path in tmp_path.iterdir()] == [f"best_step_{(0, 1, 1, 3)[step]}"]
    assert run.policy.saved == 3


@pytest.mark.parametrize("value", [0.1, None])
def test_what_an_earlier_run_left_goes(value: float | None, tmp_path: Path) -> None:
    (tmp_path / "best_step_90").mkdir()
    run = Run(tmp_path)
    run.evaluate(0, expected__pearson=value)
    assert run.finish(5)[0] == ("0" if value else "5")


def test_a_full_disk_costs_the_export_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    run.evaluate(0, expected__pearson=0.1)
    run.policy.full = True
    run.evaluate(1, expected__pearson=0.3)
    assert "judge of step 1" in caplog.text and "No space left" in caplog.text
    run.policy.full = False
    run.evaluate(2, expected__pearson=0.2)
    weights, card = run.finish(2)
    assert weights == "2" and "the best of 3 evaluations" in card


# -- resume --------------------------------------------------------------------------------------------


def resumed(first: Run, metric: str | None = "expected/pearson") -> Run:
    second = Run(first.folder, metric=metric)
    second.export.load_state_dict(json.loads(json.dumps(first.export.state_dict())))
    return second


def test_a_resumed_run_keeps_the_best_of_before(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.evaluate(0, expected__pearson=0.1)
    first.evaluate(10, expected__pearson=0.6)
    second = resumed(first)
    second.evaluate(20, expected__pearson=0.5)
    weights, card = second.finish(20)
    assert weights == "10" and card.startswith("10: step 10, the best of 3 evaluations")


def test_an_export_of_steps_that_are_made_again_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.evaluate(10, expected__pearson=0.6)
    state: dict[str, Any] = json.loads(json.dumps(run.export.state_dict()))
    run.evaluate(20, expected__pearson=0.7)  # after the checkpoint
    second = Run(tmp_path)
    second.export.load_state_dict(state)
    assert list(tmp_path.iterdir()) == []
    assert "of step 10, is no longer in" in caplog.text
    second.evaluate(20, expected__pearson=0.5)
    assert second.finish(20)[0] == "20"


def test_a_run_that_had_ended_goes_on_from_its_judge(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.evaluate(10, expected__pearson=0.6)
    state = first.export.state_dict()
    first.finish(20)
    second = Run(tmp_path)
    second.export.load_state_dict(state)
    second.evaluate(30, expected__pearson=0.4)
    assert second.finish(30)[0] == "10"


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.evaluate(10, expected__pearson=0.6)
    second = resumed(first, metric="expected/rmse")
    second.evaluate(20, expected__rmse=0.9)
    assert second.finish(20)[0] == "20"


def test_evaluations_without_a_better_judge_are_counted_also_across_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path)
    counts = []
    for step, value in enumerate((0.2, 0.3, None, 0.3, 0.1)):
        run.evaluate(step, expected__pearson=value)
        counts.append(run.export.since_best)
    assert counts == [0, 0, 0, 1, 2]  # as good is not better; an evaluation without the metric says nothing
    resumed = Run(tmp_path)
    resumed.export.load_state_dict(run.export.state_dict())
    assert resumed.export.since_best == 2
    resumed.evaluate(5, expected__pearson=0.4)
    assert resumed.export.since_best == 0
    other = Run(tmp_path, metric="decoded/pearson")
    other.export.load_state_dict(run.export.state_dict())
    assert other.export.since_best == 0
