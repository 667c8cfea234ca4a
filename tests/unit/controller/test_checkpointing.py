"""When the controller saves, what it saves, and that a resumed run is the unbroken one."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.checkpoint.errors import CheckpointError, IncompatibleCheckpointError, NoCheckpointError
from real_openrlhf.controller.checkpointing import Checkpointer, find_checkpoint, make_store
from real_openrlhf.controller.controller import Controller
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.data.stream import PromptStream
from tests.unit.checkpoint.helpers import identity
from tests.unit.controller.test_controller import World, controller, prompts

METRIC = "expected/pearson"


class Shards(World):
    """A policy whose whole state is the rows it was trained on."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.rows: list[int] = []
        self.full_disk = False

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        self.rows += [g.group.row for g in groups]
        return super().train(groups)

    def save_checkpoint(self, path: str) -> None:
        if self.full_disk:
            raise OSError(28, "No space left on device")
        Path(path).mkdir()
        (Path(path) / "rows.txt").write_text(" ".join(map(str, self.rows)))

    def load_checkpoint(self, path: str) -> None:
        self.rows = [int(row) for row in (Path(path) / "rows.txt").read_text().split()]


def with_saver(world: Shards, root: Path, *, every: int, metric: str | None = METRIC, **changes: Any) -> Controller:
    run = controller(world, **changes)
    saver = Checkpointer(
        store=make_store(root, keep=2, metric=metric),
        identity=identity(),
        policy=world,
        parts={"controller": run, "prompts": run.prompts, "rollouts": world, "evaluator": world},
        every=every,
        metric=metric,
    )
    run.saver, run.fit = saver, functools.partial(run.fit, saver)  # type: ignore[attr-defined, method-assign]
    return run


def saved_steps(root: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in root.glob("step_*"))


def test_saves_every_so_often_and_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    with_saver(Shards(), tmp_path, every=2, total_steps=8).fit()
    assert saved_steps(tmp_path) == [6, 8]


def test_a_new_best_is_saved_at_any_step_and_kept(tmp_path: Path) -> None:
    class Peaked(Shards):
        def result(self, watch: Any = None) -> Any:
            report = super().result(watch)
            report.metrics[METRIC] = 1.0 if report.version == 3 else 0.1
            return report

    with_saver(Peaked(), tmp_path, every=4, total_steps=9, eval_steps=1).fit()
    store = make_store(tmp_path, keep=2, metric=METRIC)
    assert store.find("best").step == 3
    assert store.find("latest").step == 8
    assert 3 in saved_steps(tmp_path)


def test_lower_errors_are_better(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=2, metric="expected/rmse")
    assert not store.higher_is_better
    saver = Checkpointer(store=store, identity=identity(), policy=Shards(), parts={}, every=100, metric="expected/rmse")
    assert saver.is_due(1, {"expected/rmse": 2.0})
    assert saver.save(1, {"expected/rmse": 2.0})
    assert saver.is_due(2, {"expected/rmse": 1.9})
    assert not saver.is_due(2, {"expected/rmse": 2.1})
    assert not saver.is_due(2, {"expected/rmse": None})


def test_never_saving_saves_nothing_but_on_a_signal(tmp_path: Path) -> None:
    with_saver(Shards(), tmp_path, every=-1, total_steps=2, eval_steps=1).fit()
    assert saved_steps(tmp_path) == []
    world = Shards()
    run = with_saver(world, tmp_path, every=-1, total_steps=5)
    run.stop_requested = lambda: "SIGTERM" if run.step_number == 2 else None
    with pytest.raises(Stopped, match="SIGTERM: stopped after step 2") as stopped:
        run.fit()
    assert stopped.value.saved
    assert saved_steps(tmp_path) == [2]
    assert not any(event[0] == "save" for event in world.events)  # no export of a half-trained model


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_resumed_equals_unbroken(tmp_path: Path, stop_at: int) -> None:
    # Group accuracies of 0 and 1 for some rows: dynamic sampling refills and puts prompts back.
    def labels(prompt: Any, k: int) -> int | None:
        return 1 if prompt.row % 3 == 0 else [1, 0, 2][k]

    settings: dict[str, Any] = dict(total_steps=4, eval_steps=2, n_prompts=60, seeded=True)
    whole = Shards(labels=labels)
    with_saver(whole, tmp_path / "a", every=-1, **settings).fit()

    first = Shards(labels=labels)
    broken = with_saver(first, tmp_path / "b", every=-1, **settings)
    broken.stop_requested = lambda: "SIGUSR1" if broken.step_number == stop_at else None
    with pytest.raises(Stopped):
        broken.fit()

    second = Shards(labels=labels)
    resumed = with_saver(second, tmp_path / "b", every=-1, **settings)
    checkpoint = find_checkpoint(tmp_path / "b", "latest", identity(), metric=METRIC, force=False)
    assert checkpoint is not None
    assert isinstance(resumed.saver, Checkpointer)
    assert resumed.saver.load(checkpoint) == stop_at
    resumed.fit()

    assert second.rows == whole.rows
    assert first.samplings + second.samplings == whole.samplings
    mine = [(step, phase) for step, phase, _ in first.logs + second.logs]
    assert mine == [(step, phase) for step, phase, _ in whole.logs]
    assert second.events[0] == ("sync", stop_at)  # fresh engines get the weights first


class Killed(Exception):
    """The process is gone, in the middle of a step."""


class Counted(Shards):
    """Rollouts that nobody can foresee, and the prompts that dynamic sampling drops because of them."""

    def __init__(self, dies_in_step: int | None = None) -> None:
        super().__init__(labels=lambda prompt, k: 1 if prompt.row in self.all_right else [1, 0, 2][k])
        self.all_right: set[int] = set()
        self.dropped: list[int] = []
        self.dies_in_step = dies_in_step

    def generate(self, wanted: Sequence[Any], sampling: Any) -> list[Any]:
        assert sampling.seed is None
        self.all_right = {prompt.row for prompt in wanted if random.random() < 0.4}
        self.dropped += [prompt.row for prompt in wanted if prompt.row in self.all_right]
        return super().generate(wanted, sampling)

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        if len(self.trained) + 1 == self.dies_in_step:
            raise Killed
        return super().train(groups)

    def save_checkpoint(self, path: str) -> None:
        super().save_checkpoint(path)
        (Path(path) / "dropped.json").write_text(json.dumps(self.dropped))

    def load_checkpoint(self, path: str) -> None:
        super().load_checkpoint(path)
        self.dropped = json.loads((Path(path) / "dropped.json").read_text())


@pytest.mark.parametrize("attempt", range(5))
def test_without_determinism_no_prompt_is_skipped_or_doubled(tmp_path: Path, attempt: int) -> None:
    def start(world: Counted) -> Controller:
        run = with_saver(world, tmp_path, every=2, total_steps=7, seeded=False, max_refills=50)
        stream = PromptStream(prompts(11), seed=0, num_episodes=20)
        run.prompts = run.saver.parts["prompts"] = stream  # type: ignore[union-attr, attr-defined]
        return run

    with pytest.raises(Killed):
        start(Counted(dies_in_step=4)).fit()
    checkpoint = find_checkpoint(tmp_path, "latest", identity(), metric=METRIC, force=False)
    assert checkpoint is not None and checkpoint.step == 2  # the third step was done and is lost
    world = Counted()
    run = start(world)
    assert isinstance(run.saver, Checkpointer)
    run.saver.load(checkpoint)
    run.fit()

    steps = [step for step, phase, _ in world.logs if phase == "train"]
    assert steps == [3, 4, 5, 6, 7] and len(world.rows) == 7 * 4
    # Whatever was drawn was trained on, dropped, or is put back; and drawn was the stream's beginning, each place once.
    state = run.prompts.state_dict()  # type: ignore[attr-defined]
    returned = [prompts(11)[index].row for index in state["returned"]]
    drawn = PromptStream(prompts(11), seed=0).take(11 * state["epoch"] + state["position"])
    assert Counter(world.rows) + Counter(world.dropped) + Counter(returned) == Counter(p.row for p in drawn)
    assert state["epoch"] >= 2


def test_without_a_filter_the_data_order_is_that_of_an_unbroken_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(total_steps=5, keep="all", refill=False, seeded=False)
    whole = Shards()
    with_saver(whole, tmp_path / "a", every=-1, **settings).fit()
    broken = with_saver(Shards(), tmp_path / "b", every=3, **settings)
    broken.settings = replace(broken.settings, total_steps=4)
    broken.fit()
    second = Shards()
    resumed = with_saver(second, tmp_path / "b", every=3, **settings)
    checkpoint = find_checkpoint(tmp_path / "b", "latest", identity(), metric=METRIC, force=False)
    assert checkpoint is not None and isinstance(resumed.saver, Checkpointer)
    assert resumed.saver.load(checkpoint) == 3
    resumed.fit()
    assert second.rows == whole.rows and len(set(whole.rows)) == 20


def test_a_full_disk_fails_the_save_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = Shards()
    run = with_saver(world, tmp_path, every=1, total_steps=3)
    world.full_disk = True
    run.fit()
    assert len(world.trained) == 3
    assert saved_steps(tmp_path) == []
    assert "SAVE FAILED" in caplog.text and "No space left" in caplog.text


def test_stopped_says_when_nothing_could_be_saved(tmp_path: Path) -> None:
    world = Shards()
    run = with_saver(world, tmp_path, every=-1, total_steps=3)
    world.full_disk = True
    run.stop_requested = lambda: "SIGTERM"
    with pytest.raises(Stopped) as stopped:
        run.fit()
    assert not stopped.value.saved


def test_find_checkpoint(tmp_path: Path) -> None:
    now = identity()
    assert find_checkpoint(tmp_path, "none", now, metric=METRIC, force=False) is None
    assert find_checkpoint(tmp_path, "auto", now, metric=METRIC, force=False) is None
    with pytest.raises(NoCheckpointError):
        find_checkpoint(tmp_path, "latest", now, metric=METRIC, force=False)
    with_saver(Shards(), tmp_path, every=2, total_steps=2).fit()
    for which in ("auto", "latest", str(tmp_path / "step_2")):
        found = find_checkpoint(tmp_path, which, now, metric=METRIC, force=False)
        assert found is not None and found.step == 2
    with pytest.raises(IncompatibleCheckpointError, match="data"):
        find_checkpoint(tmp_path, "latest", identity(data_sha256="e" * 64), metric=METRIC, force=False)
    assert find_checkpoint(tmp_path, "latest", identity(data_sha256="e" * 64), metric=METRIC, force=True) is not None
    (tmp_path / "step_2" / "policy" / "rows.txt").unlink()
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path, "latest", now, metric=METRIC, force=False)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("expected/pearson", True),
        ("flask/expected/accuracy", True),
        ("mass", True),
        ("flask/decoded/rmse", False),
        ("expected/ece", False),
        ("invalid_rate", False),
    ],
)
def test_whether_more_is_better(tmp_path: Path, metric: str, higher: bool) -> None:
    assert make_store(tmp_path, keep=1, metric=metric).higher_is_better is higher
