from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from real_openrlhf.common import durable
from tests.unit.checkpoint.helpers import in_child


def _old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def _name_of_the_dead(tmp_path: Path) -> str:
    assert in_child(lambda: (tmp_path / durable.owned_name("tmp", "x")).mkdir()) == 0
    (path,) = tmp_path.iterdir()
    path.rmdir()
    return path.name


def test_ones_own_are_not_leftovers(tmp_path: Path) -> None:
    (tmp_path / durable.owned_name("tmp", "x")).mkdir()
    assert durable.leftovers(tmp_path, ("tmp",)) == []


def test_those_of_the_dead_are_found_by_kind_and_name(tmp_path: Path) -> None:
    name = _name_of_the_dead(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name.replace("tmp-x", "old-x-y")).mkdir()
    assert durable.leftovers(tmp_path, ("tmp",)) == [tmp_path / name]
    assert len(durable.leftovers(tmp_path, ("tmp", "old"))) == 2
    assert durable.leftovers(tmp_path, ("old",), "x") == []
    assert len(durable.leftovers(tmp_path, ("old",), "x-y")) == 1


def test_a_process_number_given_out_again(tmp_path: Path) -> None:
    """The same number with another start time is another process."""
    start = durable._start_time(os.getpid())
    assert start > 0
    name = durable.owned_name("tmp", "x")
    (tmp_path / name).mkdir()
    earlier = name.replace(f"-{os.getpid()}-{start}-", f"-{os.getpid()}-{start - 1}-")
    assert earlier != name
    (tmp_path / earlier).mkdir()
    assert durable.leftovers(tmp_path, ("tmp",)) == [tmp_path / earlier]


def test_other_machines_get_the_benefit_of_the_doubt(tmp_path: Path) -> None:
    name = _name_of_the_dead(tmp_path).replace(f"-{durable._host()}-", "-00000000-")
    folder = tmp_path / name
    (folder / "policy").mkdir(parents=True)
    shard = folder / "policy" / "shard"
    shard.write_text("")
    for path in (folder, folder / "policy"):
        _old(path, 2 * durable.FOREIGN_STALE_SECONDS)
    # One shard is being written: the save lives.
    assert durable.leftovers(tmp_path, ("tmp",)) == []
    _old(shard, 2 * durable.FOREIGN_STALE_SECONDS)
    assert durable.leftovers(tmp_path, ("tmp",)) == [folder]


def test_names_of_others_are_never_leftovers(tmp_path: Path) -> None:
    for name in (".tmp-step_1", ".tmp-step_1-abc", "tmp-x-00000000-1-1-00000000", ".tmp-x-00000000-1-00000000"):
        (tmp_path / name).mkdir()
        _old(tmp_path / name, 1e6)
    assert durable.leftovers(tmp_path, ("tmp",)) == []


def test_exchange(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not durable.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["a"]
    assert not durable.exchange(tmp_path / "a", tmp_path / "none")


def test_file_systems_that_cannot_fsync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = errno.EINVAL

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    durable.fsync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        durable.fsync_folder(tmp_path)


@pytest.mark.parametrize("size", [0, 1, durable.MIB - 1, durable.MIB, durable.MIB + 1, 2 * durable.MIB + 5])
def test_fingerprints(tmp_path: Path, size: int) -> None:
    import hashlib

    content = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    whole = hashlib.sha256(content).hexdigest()
    assert durable.Fingerprint(size).of(path) == ("sha256", whole)
    edges = hashlib.sha256(content[: durable.MIB] + content[-durable.MIB :]).hexdigest()
    assert durable.Fingerprint(size - 1).of(path) == ("sha256_first_and_last_mib", edges)
    with pytest.raises(ValueError, match="unknown kind"):
        durable.Fingerprint.digest(path, "md5")
