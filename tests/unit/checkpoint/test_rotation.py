from __future__ import annotations

import random
from pathlib import Path

import pytest

from real_openrlhf.checkpoint.errors import CheckpointError
from real_openrlhf.checkpoint.store import CheckpointStore
from real_openrlhf.common import durable
from tests.unit.checkpoint.helpers import content_of, names, save


@pytest.mark.parametrize("seed", range(12))
def test_the_newest_and_the_best_survive_any_history(tmp_path: Path, seed: int) -> None:
    """Random metrics with ties and gaps, a new process now and then, against a list kept by hand."""
    rng = random.Random(seed)
    keep, higher, keep_best = rng.randint(1, 4), rng.random() < 0.5, rng.random() < 0.8
    options = {"keep": keep, "keep_best": keep_best, "higher_is_better": higher}
    store = CheckpointStore(tmp_path, **options)  # type: ignore[arg-type]
    saved: list[tuple[int, float | None]] = []
    best: tuple[int, float] | None = None
    for step in range(1, 15):
        if rng.random() < 0.3:
            store = CheckpointStore(tmp_path, **options).open()  # type: ignore[arg-type]
        metric = None if rng.random() < 0.2 else rng.choice((-0.5, 0.0, 0.25, 0.5, 1.0))
        made = save(store, step, metric)
        saved.append((step, metric))
        if keep_best:
            if metric is not None and (best is None or (metric > best[1] if higher else metric < best[1])):
                best = (step, metric)
            assert made.manifest.best == (best is not None and best[0] == step)
            expected = {step for step, _ in saved[-keep:]} | ({best[0]} if best else set())
            found = store.best()
            assert (found.step if found else None) == (best[0] if best else None)
        else:
            expected = {step for step, _ in saved[-keep:]}
        assert names(tmp_path) == {f"step_{step}" for step in expected}
        assert store.find("latest").step == step
        if best:
            assert store.find("best").step == best[0]


def test_the_best_is_known_after_a_restart(tmp_path: Path) -> None:
    for step, metric in ((1, 0.2), (2, 0.9), (3, 0.4), (4, 0.3), (5, 0.9)):
        made = save(CheckpointStore(tmp_path, keep=1).open(), step, metric)
    assert not made.manifest.best
    assert names(tmp_path) == {"step_2", "step_5"}
    assert CheckpointStore(tmp_path, keep=1).find("best").step == 2


def test_a_run_that_went_back_saves_the_latest(tmp_path: Path) -> None:
    """Resumed from step 2 of 6: the latest is what was saved last, and later steps of the old run rotate out."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (2, 4, 6):
        save(store, step)
    save(store, 3, content="second life")
    assert store.find("latest").step == 3
    assert names(tmp_path) == {"step_3", "step_4", "step_6"}
    save(store, 4, content="second life")
    assert names(tmp_path) == {"step_3", "step_4", "step_6"}
    assert content_of(store.find("step_4")) == "second life"
    save(store, 5)
    assert names(tmp_path) == {"step_3", "step_4", "step_5"}


def test_saving_a_step_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 0.5, "old")
    again = save(store, 1, 0.5, "new")
    assert names(tmp_path) == {"step_1"} and again.manifest.best
    assert content_of(store.find("latest")) == content_of(store.find("best")) == "new"


def test_a_displaced_best_is_kept_until_beaten(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, 0.9, "old")
    again = save(store, 1, None, "new")
    assert not again.manifest.best
    assert names(tmp_path) == {"step_1", "step_1.seq_1"}
    assert content_of(store.find("best")) == content_of(store.find("step_1.seq_1")) == "old"
    assert content_of(store.find("latest")) == content_of(store.find("step_1")) == "new"
    save(store, 2, 0.95)
    assert names(tmp_path) == {"step_2"}


def test_a_broken_one_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    (save(store, 2).path / "stream.json").unlink()
    save(store, 2, content="again")
    assert names(tmp_path) == {"step_1", "step_2"} and content_of(store.find("latest")) == "again"


def test_broken_ones_do_not_count_and_are_not_deleted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        save(store, step)
    (tmp_path / "step_2" / "stream.json").unlink()
    save(store, 3)
    assert names(tmp_path) == {"step_1", "step_2", "step_3"}
    save(store, 4)
    assert names(tmp_path) == {"step_2", "step_3", "step_4"}
    assert [c.step for c in store.complete()] == [3, 4]


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), float("-inf")])
def test_undefined_metrics_are_never_the_best(tmp_path: Path, metric: float, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=1, metric_name="pearson")
    save(store, 1, 0.1)
    assert save(store, 2, metric).metric is None
    assert "pearson is" in caplog.text
    assert store.find("best").step == 1


def test_without_a_metric_there_is_no_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, metric_name="pearson")
    save(store, 1)
    assert store.best() is None
    with pytest.raises(CheckpointError, match="has the metric 'pearson'; load the latest"):
        store.find("best")
    save(store, 2, 0.5)
    other = CheckpointStore(tmp_path, keep=1, metric_name="rmse", higher_is_better=False)
    with pytest.raises(CheckpointError, match="has the metric 'rmse', only 'pearson'"):
        other.find("best")


def test_a_deletion_that_fails_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)

    def rmtree(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        save(store, 2)
    assert "could not be removed and still takes up space" in caplog.text
    assert store.find("latest").step == 2
    assert {name.split("-")[0] for name in names(tmp_path)} == {"step_2", ".del"}


def test_nothing_is_deleted_if_the_new_one_cannot_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    real = durable.fsync_folder

    def fsync_folder(path: Path) -> None:
        real(path)
        if path == tmp_path:
            (tmp_path / "step_2" / "stream.json").unlink()

    monkeypatch.setattr(durable, "fsync_folder", fsync_folder)
    save(store, 2)
    assert "nothing older is deleted" in caplog.text
    assert store.find("latest").step == 1
