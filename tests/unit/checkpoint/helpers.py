"""Small checkpoints, and processes that really die in the middle of what they do."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from real_openrlhf.checkpoint import writer
from real_openrlhf.checkpoint.compat import RunIdentity
from real_openrlhf.checkpoint.manifest import Checkpoint, CheckpointMeta
from real_openrlhf.checkpoint.store import CheckpointStore
from real_openrlhf.common import durable

KILLED = 9
_MOVES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def identity(**changes: Any) -> RunIdentity:
    base: dict[str, Any] = {
        "model_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "data_sha256": "c" * 64,
        "template_sha256": "d" * 64,
        "scale": ((1.0, "1"), (2.0, "2"), (3.0, "3")),
        "anchors": ("Score: ",),
        "preset": "paper",
        "seed": 42,
        "ranks": 2,
        "zero_stage": 3,
        "settings": {"actor.adam.lr": 1e-6},
    }
    return RunIdentity(**{**base, **changes})


def meta() -> CheckpointMeta:
    return CheckpointMeta(identity=identity(), weight_version=7)


def save(store: CheckpointStore, step: int, metric: float | None = None, content: str | None = None) -> Checkpoint:
    """Two files: one written through the writer, one as another process would write it."""
    with store.begin(step, meta()) as opened:
        opened.write_json("stream.json", {"content": content or f"step {step}"})
        (opened.path / "policy").mkdir()
        (opened.path / "policy" / "rank_0.pt").write_bytes(f"weights of step {step}".encode())
        return opened.commit(metric)


def content_of(checkpoint: Checkpoint) -> str:
    return checkpoint.read_json("stream.json")["content"]


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def in_child(body: Callable[[], object]) -> int:
    """Run it in a forked process; returns its exit code, 0 if body finished. Nothing is cleaned up at its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def deaths(scenario: Callable[[], object]) -> Iterator[int]:
    """Run the scenario again and again, dying before its 1st, 2nd, ... change of the disk, until it survives.

    Yields after each death; the last, complete run ends the iteration. The caller resets the folder itself.
    """
    for fatal in count(1):
        code = in_child(partial(_doomed, scenario, fatal))
        if code == 0:
            assert fatal > 10, "the scenario changes nothing: the harness does not see its calls"
            return
        assert code == KILLED, f"the scenario failed by itself before change {fatal}"
        yield fatal


def _doomed(scenario: Callable[[], object], fatal: int) -> None:
    left = fatal

    def point() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(KILLED)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in _MOVES or writes:
            point()

    real_fsync, real_exchange = os.fsync, durable.exchange

    def fsync(descriptor: int) -> None:
        point()
        real_fsync(descriptor)

    def write_file(path: Path, content: bytes) -> None:
        with open(path, "xb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            point()
            file.write(content[len(content) // 2 :])
            fsync(file.fileno())

    def exchange(a: Path, b: Path) -> bool:
        point()
        done = real_exchange(a, b)
        point()
        return done

    os.fsync = fsync  # type: ignore[assignment]
    durable.write_file = writer.write_file = write_file
    durable.exchange = exchange
    sys.addaudithook(hook)
    scenario()
