"""One writer per folder, known by a lock that ends with its process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from real_openrlhf import evaluate, train_warmup
from real_openrlhf.common.errors import FolderError
from real_openrlhf.common.folder_lock import LOCK_FILE, FolderInUseError, FolderLock
from real_openrlhf.data import __main__ as data
from real_openrlhf.judge.output import open_output
from tests.helpers.tiny_judge import make_rows, make_tokenizer, write_rows

ROOT = Path(__file__).parents[3]
HOLD = """
import subprocess, sys, time
from real_openrlhf.common.folder_lock import FolderLock
lock = FolderLock(sys.argv[1], "--output_dir")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
print(child.pid, flush=True)
time.sleep(600)
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process that holds the folder, and the id of its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_the_second_writer_is_told_who_is_the_first(tmp_path: Path) -> None:
    process, child = start(tmp_path)
    try:
        with pytest.raises(FolderInUseError) as caught:
            FolderLock(tmp_path, "--output_dir")
        for part in (f"--output_dir {tmp_path} is in use", f"process {process.pid} on {socket.gethostname()}"):
            assert part in str(caught.value)
        # Killed, with a child that lives on: the folder is free at once, though the file is still there.
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)
        assert (tmp_path / LOCK_FILE).exists()
        with FolderLock(tmp_path, "--output_dir"):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "--output_dir")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        time.sleep(600)
        os._exit(0)
    try:
        os.read(reader, 1)
        with pytest.raises(FolderInUseError, match="this process itself"):
            FolderLock(tmp_path, "--output_dir")
        # As at the end of this process, which unlocks nothing but closes its descriptor.
        lock._close()
        FolderLock(tmp_path, "--output_dir").release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    with FolderLock(deep, "--output_dir"):
        assert (deep / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(deep, "--output_dir"):
        (deep / "result").touch()
    assert [path.name for path in deep.iterdir()] == ["result"]
    lock = FolderLock(deep, "--output_dir")
    lock.release()
    lock.release()
    with pytest.raises(ValueError, match="oops"), FolderLock(deep, "--output_dir"):
        raise ValueError("oops")
    FolderLock(deep, "--output_dir").release()


def test_one_that_waited_at_a_removed_file_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its open and its lock the holder before removes the file, and the folder with it."""
    import fcntl

    real, folder = fcntl.flock, tmp_path / "x"
    gone: list[bool] = []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if not gone:
            gone.append(True)
            (folder / LOCK_FILE).unlink()
            folder.rmdir()

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(folder, "--output_dir"):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_file_in_a_folder_is_locked_alone(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "--output", file=tmp_path / "a.jsonl"):
        with pytest.raises(FolderInUseError, match=rf"--output {tmp_path}/a.jsonl is in use"):
            FolderLock(tmp_path, "--output", file=tmp_path / "a.jsonl")
        FolderLock(tmp_path, "--output", file=tmp_path / "b.jsonl").release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"--output_dir .*file is a file; give a folder"):
        FolderLock(tmp_path / "file", "--output_dir")
    with pytest.raises(FolderError, match=r"--output_dir .*below cannot be written: Not a directory"):
        FolderLock(tmp_path / "file" / "below", "--output_dir")
    with pytest.raises(FolderError, match=r"--output_dir /proc/none/x cannot be written"):
        FolderLock("/proc/none/x", "--output_dir")


def test_every_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", make_rows(4, seed=0)))
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    out, model = str(tmp_path / "out"), str(tmp_path / "m")
    calls = (
        (data.main, ["generic", "--scale=1-5", "--map", "prompt=prompt", "--source", rows, "--output_dir", out]),
        (evaluate.main, ["--model", model, "--benchmark", rows, "--output_dir", out, "--scale=1-5"]),
    )
    with FolderLock(out, "other"):
        for main, words in calls:
            assert main(words) == 2
            assert f"error: --output_dir {out} is in use: this process itself" in capsys.readouterr().err
        warmup = ["--actor.model_name_or_path", model, "--data.prompt_dataset", rows, "--ckpt.output_dir", out]
        assert train_warmup.main(warmup) == 2
        assert f"error: --ckpt.output_dir {out} is in use: this process itself" in capsys.readouterr().err
        assert [path.name for path in Path(out).iterdir()] == [LOCK_FILE]
    target = tmp_path / "scores.jsonl"
    with open_output(str(target), overwrite=False, resume=False, identity={}) as first:
        for resume in (False, True):
            again = open_output(str(target), overwrite=not resume, resume=resume, identity={})
            with pytest.raises(FolderInUseError, match=rf"--output {target} is in use"), again:
                pass
        first.write({"a": 1})
    assert target.read_text() == '{"a": 1}\n' and not list(tmp_path.rglob("*.lock"))


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path, "--output_dir"):
        assert "cannot be locked" in caplog.text
