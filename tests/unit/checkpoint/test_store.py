from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from real_openrlhf.checkpoint.errors import CheckpointError, CheckpointWriteError, NoCheckpointError
from real_openrlhf.checkpoint.manifest import MANIFEST_FILE
from real_openrlhf.checkpoint.store import CheckpointStore
from real_openrlhf.common import durable
from tests.unit.checkpoint.helpers import content_of, in_child, meta, names, save


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep=3).open()


def test_what_was_saved_is_read_again(store: CheckpointStore) -> None:
    state: dict[str, Any] = {"rng": torch.arange(5, dtype=torch.uint8), "seen": [1, 2], "by_row": {3: (0.5, None)}}
    with store.begin(12, meta()) as writer:
        writer.write_torch("rank_0.pt", state)
        writer.write_json("state/stream.json", {"position": 3, "nan": float("nan")})
        made = writer.commit(0.25)
    found = CheckpointStore(store.root, keep=3).find("latest")
    assert found == made and found.path == store.root / "step_12" and found.step == 12 and found.metric == 0.25
    assert found.meta == meta() and found.manifest.best
    assert found.read_json("state/stream.json")["position"] == 3
    back = found.read_torch("rank_0.pt")
    assert torch.equal(back["rng"], state["rng"]) and back["by_row"] == state["by_row"]
    with pytest.raises(CheckpointError, match=r"no\.json"):
        found.read_json("no.json")
    with pytest.raises(CheckpointError, match=r"stream\.json"):
        found.read_torch("state/stream.json")


def test_the_manifest_lists_every_file_and_says_what_is_hashed(tmp_path: Path) -> None:
    import hashlib

    store = CheckpointStore(tmp_path, keep=1, hash_whole_up_to=2 * durable.MIB)
    large = os.urandom(3 * durable.MIB + 17)
    with store.begin(1, meta()) as writer:
        (writer.path / "large").write_bytes(large)
        (writer.path / "small").write_bytes(b"abc")
        writer.commit()
    content = json.loads((tmp_path / "step_1" / MANIFEST_FILE).read_text())
    assert "first and last MiB" in content["hashes"] and "above 2 MiB" in content["hashes"]
    edges = hashlib.sha256(large[: durable.MIB] + large[-durable.MIB :]).hexdigest()
    assert content["files"] == [
        {"path": "large", "size": len(large), "kind": "sha256_first_and_last_mib", "hash": edges},
        {"path": "small", "size": 3, "kind": "sha256", "hash": hashlib.sha256(b"abc").hexdigest()},
    ]
    # Only the edges of a large file are checked, not the middle, as the manifest says.
    path = tmp_path / "step_1" / "large"
    path.write_bytes(large[: 2 * durable.MIB] + b"x" + large[2 * durable.MIB + 1 :])
    store.find("latest")
    path.write_bytes(large[:-1] + bytes([large[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="other content"):
        store.find("latest")


def test_everything_is_forced_to_disk_and_the_manifest_last(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(a: Path, b: Path) -> None:
        events.append(f"rename to {Path(b).name}")
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with store.begin(1, meta()) as writer:
        temporary = writer.path.name
        (writer.path / "policy").mkdir()
        (writer.path / "policy" / "shard").write_bytes(b"1")
        writer.commit()
    assert events == ["shard", "policy", temporary, MANIFEST_FILE, temporary, "rename to step_1", "checkpoints"]


# --- failing saves


def _full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def _assert_nothing_but(store: CheckpointStore, name: str) -> None:
    assert names(store.root) == {name}
    assert content_of(store.find("latest")) == "step 1"


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_disk_that_fills_up_fails_the_save_only(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nth: int
) -> None:
    save(store, 1)
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise _full()
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            save(store, 2)
    assert [r.levelname for r in caplog.records if "SAVE FAILED" in r.message] == ["ERROR"]
    _assert_nothing_but(store, "step_1")
    save(store, 2)
    assert store.find("latest").step == 2


def test_the_fsync_after_the_rename_fails(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one is there, though perhaps not for good: then nothing older may go."""
    store = CheckpointStore(store.root, keep=1)
    save(store, 1)
    real = durable.fsync_folder

    def fsync_folder(path: Path) -> None:
        if path == store.root:
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(durable, "fsync_folder", fsync_folder)
    with pytest.raises(CheckpointWriteError, match="nothing older was deleted"):
        save(store, 2)
    assert names(store.root) == {"step_1", "step_2"}


def test_a_write_that_the_kernel_refuses(store: CheckpointStore) -> None:
    """A file-size limit is a full disk that a test can make."""
    save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in ("write_json", "write_torch"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(CheckpointWriteError, match="File too large"), store.begin(2, meta()) as writer:
                getattr(writer, write)("big", list(range(10_000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        _assert_nothing_but(store, "step_1")


def test_no_room_for_the_folder_itself(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        raise _full()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        store.begin(2, meta())


def test_renaming_into_place_fails(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(a).name.startswith(".tmp"):
            raise _full()
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    for step in (1, 2):
        with pytest.raises(CheckpointWriteError, match="No space left"):
            save(store, step, content="new")
        _assert_nothing_but(store, "step_1")


def test_any_exception_in_the_block_aborts(store: CheckpointStore) -> None:
    save(store, 1)
    with (
        pytest.raises(CheckpointWriteError, match=r"rank 1 died \(\d+ MiB were free") as caught,
        store.begin(2, meta()),
    ):
        raise RuntimeError("rank 1 died")
    assert isinstance(caught.value.__cause__, RuntimeError)
    _assert_nothing_but(store, "step_1")
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), store.begin(2, meta()):
            raise error
        _assert_nothing_but(store, "step_1")


@pytest.mark.parametrize("name", ["../x", "/x", "", MANIFEST_FILE])
def test_names_outside_of_the_checkpoint(store: CheckpointStore, name: str) -> None:
    with pytest.raises(CheckpointWriteError, match="not a name"), store.begin(1, meta()) as writer:
        writer.write_json(name, 1)
    assert names(store.root) == set()


def test_what_could_not_be_loaded_is_not_saved(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match="not saved"), store.begin(1, meta()) as writer:
        writer.write_torch("state", {"path": CheckpointStore})
    with pytest.raises(CheckpointWriteError, match="not JSON serializable"), store.begin(1, meta()) as writer:
        writer.write_json("state", {"path": tmp_path})
    with pytest.raises(CheckpointWriteError, match="exists"), store.begin(1, meta()) as writer:
        writer.write_json("state", 1)
        writer.write_json("state", 2)
    with pytest.raises(CheckpointWriteError, match="link"), store.begin(1, meta()) as writer:
        (writer.path / "link").symlink_to(tmp_path)
        writer.commit()
    with pytest.raises(CheckpointWriteError, match="nothing was written"), store.begin(1, meta()) as writer:
        writer.commit()
    with pytest.raises(CheckpointWriteError, match="reserved"), store.begin(1, meta()) as writer:
        (writer.path / MANIFEST_FILE).write_text("{}")
        writer.commit()
    assert names(store.root) == set()


def test_a_writer_is_used_once(store: CheckpointStore) -> None:
    writer = store.begin(1, meta())
    writer.write_json("a", 1)
    writer.commit()
    writer.abort()
    assert names(store.root) == {"step_1"}
    with pytest.raises(CheckpointWriteError, match="committed already"):
        writer.write_json("b", 1)
    writer = store.begin(2, meta())
    writer.abort()
    with pytest.raises(CheckpointWriteError, match="aborted already"):
        writer.commit()
    with store.begin(3, meta()):
        pass  # forgot to commit
    assert names(store.root) == {"step_1"}


@pytest.mark.parametrize("step", [-1, True, 1.0])
def test_steps_that_are_none(store: CheckpointStore, step: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        store.begin(step, meta())  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0, -1, True, 1.5])
def test_numbers_to_keep_that_are_none(tmp_path: Path, keep: object) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep=keep)  # type: ignore[arg-type]


# --- broken checkpoints


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _truncate(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DEFECTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: (p / "policy" / "rank_0.pt").unlink(), r"policy/rank_0\.pt is missing"),
    (lambda p: shutil.rmtree(p / "policy"), r"policy/rank_0\.pt is missing"),
    (lambda p: _truncate(p / "policy" / "rank_0.pt"), r"policy/rank_0\.pt has 16 bytes, not 17"),
    (lambda p: _flip(p / "policy" / "rank_0.pt", 0), r"policy/rank_0\.pt has other content"),
    (lambda p: _flip(p / "policy" / "rank_0.pt", -1), r"policy/rank_0\.pt has other content"),
    (lambda p: (p / MANIFEST_FILE).unlink(), r"manifest\.json is missing"),
    (lambda p: _truncate(p / MANIFEST_FILE, 2), r"manifest\.json is not valid JSON"),
    (lambda p: (p / MANIFEST_FILE).write_bytes(b""), r"manifest\.json is not valid JSON"),
    (lambda p: (p / MANIFEST_FILE).write_bytes(b"\xff\xfe{"), r"manifest\.json is not valid JSON"),
    (lambda p: (p / MANIFEST_FILE).write_text("[]"), "not the manifest of a checkpoint"),
    (lambda p: _edit_manifest(p, format="other"), "not the manifest of a checkpoint"),
    (lambda p: _edit_manifest(p, format_version=2), "has format version 2, this program reads version 1"),
    (lambda p: _edit_manifest(p, metric=0.99), "was changed after it was written"),
    (lambda p: _make_folder(p / MANIFEST_FILE), r"manifest\.json cannot be read"),
]


@pytest.mark.parametrize("damage, message", DEFECTS, ids=[str(i) for i in range(len(DEFECTS))])
def test_a_broken_one_is_passed_over_with_a_warning(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], message: str
) -> None:
    import re

    save(store, 1, 0.1)
    newest = save(store, 2, 0.2)
    damage(newest.path)
    assert content_of(store.find("latest")) == "step 1"
    assert content_of(store.find("best")) == "step 1"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and re.search(message, warnings[0])
    with pytest.raises(CheckpointError, match=message):
        store.find(newest.path)
    shutil.rmtree(store.root / "step_1")
    for which in ("latest", "best"):
        with pytest.raises(CheckpointError, match=message) as caught:
            store.find(which)
        assert not isinstance(caught.value, NoCheckpointError)


def test_a_flipped_bit_of_the_manifest_is_noticed(store: CheckpointStore) -> None:
    path = save(store, 1, 0.5).path / MANIFEST_FILE
    content = path.read_bytes()
    whole = json.loads(content)
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == whole  # a space for a tab, say
        except ValueError:
            same = False
        if not same:
            with pytest.raises(CheckpointError):
                store.find("latest")


def test_files_that_came_later_do_no_harm(store: CheckpointStore) -> None:
    made = save(store, 1)
    (made.path / "notes.txt").write_text("mine")
    assert store.find("latest") == made


def test_asking_for_a_path(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = save(store, 1)
    save(store, 2)
    assert store.find(made.path) == store.find(str(made.path)) == store.find("step_1") == made
    elsewhere = tmp_path / "copy"
    shutil.copytree(made.path, elsewhere)
    monkeypatch.chdir(tmp_path)
    assert content_of(store.find("copy")) == "step 1"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint step_3; in .* there is step_1, step_2"):
        store.find("step_3")
    with pytest.raises(CheckpointError, match="holds checkpoints but is not one; give one of them: step_1, step_2"):
        store.find(store.root)
    with pytest.raises(CheckpointError, match=r"manifest\.json is a file"):
        store.find(made.path / MANIFEST_FILE)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        store.find(tmp_path)


def test_none_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "new"):
        for which in ("latest", "best"):
            with pytest.raises(NoCheckpointError, match="no checkpoint in"):
                CheckpointStore(root, keep=1).find(which)
    assert not (tmp_path / "new").exists()


def test_the_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = CheckpointStore(root, keep=1)
        with pytest.raises(CheckpointError, match="is a file"):
            store.open()
        with pytest.raises(CheckpointError, match="is a file"):
            store.find("latest")


def test_a_folder_that_not_all_nodes_see(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new", keep=1)
    store.check_shared(lambda path: [Path(path).exists()] * 3)
    with pytest.raises(CheckpointError, match=r"ranks \[1\] run on nodes that do not see .*new: .* all nodes share"):
        store.check_shared(lambda path: [Path(path).exists(), Path(path + "_elsewhere").exists()])
    assert names(store.root) == set()


def test_a_file_in_the_place_of_a_checkpoint(store: CheckpointStore) -> None:
    save(store, 1)
    (store.root / "step_2").write_text("")
    assert store.find("latest").step == 1
    with pytest.raises(CheckpointError, match="step_2 is a file"):
        store.find("step_2")
    with pytest.raises(CheckpointWriteError, match="step_2"):
        save(store, 2)
    assert names(store.root) == {"step_1", "step_2"}


def test_no_permission(capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        store = CheckpointStore(root / "run", keep=2).open()
        made = save(store, 1)

        def outcome(which: str) -> str:
            def body() -> None:
                if os.geteuid() == 0:
                    os.seteuid(65534)  # root may do everything
                try:
                    reader = CheckpointStore(root / "run", keep=2)
                    reader.open() if which == "open" else reader.find(which)
                except CheckpointError as error:
                    os.write(1, f"{which}: {error}\n".encode())

            assert in_child(body) == 0
            return capfd.readouterr().out

        (root / "run").chmod(0o555)
        assert "no permission to write checkpoints into" in outcome("open")
        assert outcome("latest") == ""
        (made.path / "stream.json").chmod(0)
        assert "no permission to read" in outcome("latest") and "stream.json" in outcome("latest")
        (made.path / MANIFEST_FILE).chmod(0)
        assert "manifest.json" in outcome(str(made.path))
        made.path.chmod(0)
        assert "no permission to read the checkpoint" in outcome(str(made.path))
        (root / "run").chmod(0)
        assert "cannot be listed" in outcome("latest")
        (root / "run").chmod(0o755)
        made.path.chmod(0o755)


# --- leftovers


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(store: CheckpointStore) -> None:
    def die_while_saving() -> None:
        writer = CheckpointStore(store.root, keep=1).begin(5, meta())
        writer.write_json("a", 1)
        os._exit(0)

    save(store, 1)
    living = store.begin(4, meta())
    assert in_child(die_while_saving) == 0
    (store.root / ".tmp-mine").mkdir()
    assert len([name for name in names(store.root) if name.startswith(".tmp-step_5")]) == 1
    CheckpointStore(store.root, keep=1).open()
    assert names(store.root) == {"step_1", living.path.name, ".tmp-mine"}
    living.write_json("a", 1)
    living.commit()
    assert store.find("latest").step == 4


def test_another_living_process_is_seen(store: CheckpointStore) -> None:
    read_end, write_end = os.pipe()
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        CheckpointStore(store.root, keep=1).begin(5, meta())
        os.write(told, b"x")
        os.read(read_end, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        store.open()
        assert len(names(store.root)) == 1
    finally:
        os.write(write_end, b"x")
        os.waitpid(pid, 0)
        for end in (read_end, write_end, ready, told):
            os.close(end)
    store.open()
    assert names(store.root) == set()
