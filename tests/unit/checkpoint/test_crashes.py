"""Once there is a complete checkpoint, a process that dies at any moment leaves a complete one.

Every scenario runs in separate processes that really end, without any clean-up, before their first, second,
third ... change of the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from real_openrlhf.checkpoint.errors import NoCheckpointError
from real_openrlhf.checkpoint.store import CheckpointStore
from tests.unit.checkpoint.helpers import content_of, deaths, names, save


def _fresh(root: Path, prepared: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(prepared, root)


def _prepare(tmp_path: Path, build: Callable[[CheckpointStore], object]) -> tuple[Path, Path]:
    prepared, root = tmp_path / "prepared", tmp_path / "root"
    build(CheckpointStore(prepared, keep=2).open())
    _fresh(root, prepared)
    return root, prepared


def test_the_first_save_is_whole_or_not_there(tmp_path: Path) -> None:
    root = tmp_path / "root"
    seen = set()
    for _ in deaths(lambda: save(CheckpointStore(root, keep=1), 1, 0.5)):
        store = CheckpointStore(root, keep=1)
        try:
            found = store.find("latest")
            assert content_of(found) == "step 1"
            seen.add("there")
        except NoCheckpointError:
            seen.add("not there")
        assert names(store.open().root) <= {"step_1"}
        shutil.rmtree(root)
    assert seen == {"there", "not there"}


def test_a_save_with_rotation_never_loses_the_newest_or_the_best(tmp_path: Path) -> None:
    def build(store: CheckpointStore) -> None:
        for step, metric in ((1, 0.9), (2, 0.1), (3, 0.2)):
            save(store, step, metric)

    root, prepared = _prepare(tmp_path, build)
    assert names(root) == {"step_1", "step_2", "step_3"}
    latest = set()
    for _ in deaths(lambda: save(CheckpointStore(root, keep=2), 4, 0.3)):
        store = CheckpointStore(root, keep=2)
        found = store.find("latest")
        latest.add(found.step)
        assert content_of(found) == f"step {found.step}"
        assert store.find("best").step == 1
        store.open()
        assert not [name for name in names(root) if name.startswith(".")]
        # The next process can go on as if nothing had been.
        save(store, 5, 0.0)
        assert store.find("latest").step == 5 and store.find("best").step == 1
        _fresh(root, prepared)
    assert latest == {3, 4}


@pytest.mark.parametrize("metric, best", [(0.9, "new"), (0.1, "old")])
def test_saving_a_step_again_always_leaves_one_of_the_two(tmp_path: Path, metric: float, best: str) -> None:
    root, prepared = _prepare(tmp_path, lambda store: save(store, 1, 0.5, "old"))
    seen = set()
    for _ in deaths(lambda: save(CheckpointStore(root, keep=1), 1, metric, "new")):
        store = CheckpointStore(root, keep=1)
        found = content_of(store.find("latest"))
        seen.add(found)
        if found == "new":
            assert content_of(store.find("best")) == best
        else:
            assert content_of(store.find("best")) == "old"
        _fresh(root, prepared)
    assert seen == {"old", "new"}
    # The survivor of the last, complete run.
    store = CheckpointStore(root, keep=1)
    save(store, 1, metric, "new")
    assert names(root) == ({"step_1"} if best == "new" else {"step_1", "step_1.seq_1"})


def test_random_histories_with_deaths(tmp_path: Path) -> None:
    """Several lives in one folder, each dying somewhere else: what was committed last is never lost."""
    root = tmp_path / "root"
    save(CheckpointStore(root, keep=1).open(), 0, 0.0)

    def live() -> None:
        store = CheckpointStore(root, keep=1).open()
        step = store.find("latest").step
        for i in (1, 2):
            save(store, step + i, 0.1 * i)

    step = 0
    for _ in deaths(live):
        store = CheckpointStore(root, keep=1)
        found = store.find("latest")
        assert found.step in (step, step + 1, step + 2)
        assert (store.find("best").metric or 0.0) >= (found.metric or 0.0)
        step = found.step
        assert len([name for name in names(root) if name.startswith("step_")]) <= 3
    assert step > 0
