"""One writer per folder: a lock file whose lock the kernel releases when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType

from real_openrlhf.common.errors import FolderError

logger = logging.getLogger(__name__)

LOCK_FILE = ".real_openrlhf.lock"
# Errors of file systems without locks: there the run goes on, and two writers are not detected.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(FolderError):
    """Another process writes into the folder; the message names it, its process and its host."""


class FolderLock:
    """A lock on a folder, held from its construction until `release`, the end of the `with` block, or of the process.

    folder  made if it is missing; `release` removes it again if nothing was written into it
    flag    the flag that names the folder, for messages
    file    lock only this file in the folder, not the whole folder

    Raises FolderInUseError if another process, or another lock of this process, holds it, and FolderError if the
    folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, flag: str, *, file: Path | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / (LOCK_FILE if file is None else f".{file.name}.lock")
        self.what = f"{flag} {self.folder if file is None else file}"
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self._descriptor: int | None = None
        try:
            self._acquire()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise FolderError(self._problem(error)) from error
            raise
        _HELD.add(self)

    def _acquire(self) -> None:
        if any(lock.path.resolve() == self.path.resolve() for lock in _HELD if lock._descriptor is not None):
            # The kernel is not asked: on NFS, closing a second descriptor would release the first one's lock.
            raise FolderInUseError(f"{self.what} is in use: this process itself writes into it; {_ADVICE}")
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Programs that this process starts do not inherit the descriptor; for plain forks, `_forget` closes it.
            self._descriptor = descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = _holder(descriptor)
                self._close()
                raise FolderInUseError(f"{self.what} is in use: {who} writes into it; {_ADVICE}") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning("%s cannot be locked: %s; make sure only one program writes there", self.what, error)
                return
            if _is_still(descriptor, self.path):
                break
            # The earlier holder has just removed the lock file.
            self._close()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)

    def _problem(self, error: OSError) -> str:
        if self.folder.exists() and not self.folder.is_dir():
            return f"{self.what} is a file; give a folder"
        return f"{self.what} cannot be written: {error.strerror or error}"

    def release(self) -> None:
        """A second call does nothing."""
        if self._descriptor is not None:
            # Removed while still locked: a process that opened it meanwhile sees that it is gone, and makes a new one.
            self.path.unlink(missing_ok=True)
            self._close()
        made, self._made = self._made, []
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break  # something was written into the folder, or it was never made

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _forget(self) -> None:
        """In a forked child: give up the inherited lock, which belongs to the parent and must end with it."""
        self._made = []
        self._close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_ADVICE = "wait for it, or choose another folder"
_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget()


os.register_at_fork(after_in_child=_forget_all)


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['pid']} on {found['host']}, since {found['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has not written its number yet


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    mine = os.fstat(descriptor)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
