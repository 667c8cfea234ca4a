from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from real_openrlhf.common import durable
from real_openrlhf.common.atomic_folder import atomic_folder, repair_folder
from real_openrlhf.common.errors import FolderError
from tests.unit.checkpoint.helpers import deaths, in_child, names


@pytest.fixture(params=["exchange", "two renames"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(durable, "exchange", lambda a, b: False)
    return request.param


def _export(target: Path, version: str) -> None:
    with atomic_folder(target) as folder:
        (folder / "weights").write_text(version)
        (folder / "sub").mkdir()
        (folder / "sub" / "config").write_text(version)


def _version(target: Path) -> str:
    texts = {(target / "weights").read_text(), (target / "sub" / "config").read_text()}
    assert len(texts) == 1
    return texts.pop()


def test_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    _export(target, "1")
    assert _version(target) == "1" and names(target.parent) == {"model"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_old_folder_is_replaced_in_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _export(target, "1")
    (target / "stray").write_text("of the old one")
    _export(target, "2")
    assert _version(target) == "2" and names(target) == {"weights", "sub"} and names(tmp_path) == {"model"}


def test_a_failure_leaves_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "model"
    for expected in (set(), {"model"}):
        for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
            with pytest.raises(type(error)), atomic_folder(target) as folder:
                (folder / "weights").write_text("2")
                raise error
            assert names(tmp_path) == expected
        if not expected:
            assert "was not written" in caplog.text
            _export(target, "1")
    assert _version(target) == "1" and "is as it was before" in caplog.text


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    target = tmp_path / "model"
    _export(target, "1")
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        _export(target, "2")
    assert _version(target) == "1" and names(tmp_path) == {"model"}


def test_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    _export(target, "1")
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(a).name.startswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(durable, "exchange", lambda a, b: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        _export(target, "2")
    assert _version(target) == "1" and names(tmp_path) == {"model"}


def test_a_death_at_any_moment(tmp_path: Path, way: str) -> None:
    root, target = tmp_path / "root", tmp_path / "root" / "model"
    seen, gaps = set(), 0
    _export(target, "1")
    for _ in deaths(lambda: _export(target, "2")):
        if target.exists():
            _version(target)
        else:
            gaps += 1
        repair_folder(target)
        seen.add(_version(target))
        assert names(root) == {"model"} or all(name.startswith(".tmp") for name in names(root) - {"model"})
        assert in_child(lambda: _export(target, "3")) == 0
        assert _version(target) == "3" and names(root) == {"model"}
        shutil.rmtree(root)
        _export(target, "1")
    assert _version(target) == "2"
    assert seen == {"1", "2"}
    # Between two renames there is a moment without; the exchange has none.
    assert gaps == (0 if way == "exchange" else 1)


def test_the_next_export_repairs_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    monkeypatch.setattr(durable, "exchange", lambda a, b: False)
    _export(target, "1")

    def die_between_the_renames() -> None:
        real = os.rename
        os.rename = lambda a, b: os._exit(9) if Path(a).name.startswith(".tmp") else real(a, b)  # type: ignore
        _export(target, "2")

    assert in_child(die_between_the_renames) == 9
    assert not target.exists()
    with pytest.raises(ValueError), atomic_folder(target):
        assert _version(target) == "1"
        raise ValueError
    assert _version(target) == "1" and names(tmp_path) == {"model"}


def test_a_neighbour_of_a_similar_name_is_left_alone(tmp_path: Path) -> None:
    def die_while_exporting() -> None:
        with atomic_folder(tmp_path / "model-2"):
            os._exit(0)

    in_child(die_while_exporting)
    (left,) = names(tmp_path)
    _export(tmp_path / "model", "1")
    assert names(tmp_path) == {"model", left}
    _export(tmp_path / "model-2", "1")
    assert names(tmp_path) == {"model", "model-2"}


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    _export(tmp_path / "disk" / "model", "1")
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    _export(link, "2")
    assert link.is_symlink() and _version(tmp_path / "disk" / "model") == "2"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(FolderError, match="is a file"), atomic_folder(target):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine"
