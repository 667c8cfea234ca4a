"""One save in progress: files are written into a temporary folder, which becomes a checkpoint at `commit`, else is
removed."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from real_openrlhf.checkpoint.errors import CheckpointWriteError
from real_openrlhf.checkpoint.manifest import MANIFEST_FILE, Checkpoint
from real_openrlhf.common.durable import MIB, remove_tree, write_file

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Made by `CheckpointStore.begin`; use it as a context manager.

        try:
            with store.begin(step, meta) as writer:
                policy.save(writer.path / "policy")   # other processes may write here
                writer.write_json("stream.json", stream.state_dict())
                writer.commit(metric)
        except CheckpointWriteError:
            ...  # logged already; the run goes on without this checkpoint

    After any exception inside the block, such as a full disk, the temporary folder is removed, the error is logged, and
    CheckpointWriteError is raised; KeyboardInterrupt and SystemExit are raised unchanged.
    """

    def __init__(self, path: Path, step: int, install: Callable[[CheckpointWriter, float | None], Checkpoint]) -> None:
        self.path = path
        self.step = step
        self._install = install
        self._closed = ""

    def write_json(self, name: str, content: Any) -> None:
        """Write a new file `name` (may have slashes). Tuples are read back as lists, keys as strings."""
        with self._guard():
            self._write(name, (json.dumps(content, indent=1) + "\n").encode())

    def write_torch(self, name: str, state: Any) -> None:
        """Write a new file `name` of tensors, numbers, strings, lists, dicts: what `weights_only` loading allows.

        This makes a copy of the state in memory; write large shards into `path` directly.
        """
        import torch

        with self._guard():
            buffer = io.BytesIO()
            torch.save(state, buffer)
            # If it cannot be read back, that must fail now, not at a resume.
            torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True, map_location="cpu")
            self._write(name, buffer.getvalue())

    def commit(self, metric: float | None = None) -> Checkpoint:
        """Make the folder a checkpoint: fsync, manifest, rename, then rotation. NaN counts as no metric."""
        with self._guard():
            checkpoint = self._install(self, metric)
        self._closed = "committed"
        return checkpoint

    def abort(self) -> None:
        """Remove the temporary folder; does nothing after a commit or another abort."""
        if not self._closed:
            self._closed = "aborted"
            remove_tree(self.path)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if not self._closed:
                logger.warning("the checkpoint of step %d was neither committed nor aborted: aborted", self.step)
            self.abort()
        elif self._closed:
            return  # the error came from a method, which has handled it; or it came after the commit
        else:
            with self._guard():
                raise error

    @contextmanager
    def _guard(self) -> Iterator[None]:
        if self._closed:
            raise CheckpointWriteError(f"the checkpoint of step {self.step} is {self._closed} already")
        try:
            yield
        except Exception as error:
            room = self._room()  # asked before the clean-up frees space
            self.abort()
            if not isinstance(error, CheckpointWriteError):
                message = f"the checkpoint of step {self.step} was not saved: {type(error).__name__}: {error}{room}"
                failure = CheckpointWriteError(f"{message}; earlier checkpoints in {self.path.parent} are untouched")
            else:
                failure = error
            logger.error("SAVE FAILED: %s", failure, exc_info=error)
            if failure is error:
                raise
            raise failure from error
        except BaseException:
            self.abort()
            raise

    def _room(self) -> str:
        """How much space is left, in words: torch reports a full disk only as "unexpected pos"."""
        try:
            return f" ({shutil.disk_usage(self.path.parent).free / MIB:.0f} MiB were free on that disk)"
        except OSError:
            return ""

    def _write(self, name: str, content: bytes) -> None:
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or name == MANIFEST_FILE:
            raise ValueError(f"{name!r} is not a name for a file of a checkpoint")
        path = self.path / pure
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
