"""Durable files and folders: fsync, atomic renames, and temporary names that tell which process made them."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

MIB = 1 << 20
# Whether a process on another machine is alive cannot be asked: a save without progress for so long counts as dead.
FOREIGN_STALE_SECONDS = 3600.0

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Errors of file systems that cannot fsync a folder; there, a rename cannot be made more durable.
_NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def write_file(path: Path, content: bytes) -> None:
    """Write and fsync a new file; FileExistsError if it is there already."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_file(path: Path) -> None:
    """Force a file to the disk, whichever process wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries (names, not contents) to the disk."""
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
        logger.debug("%s cannot be fsynced: %s", path, error)


def fsync_tree(root: Path) -> None:
    """fsync every file and folder of a tree, bottom up, `root` last."""
    for folder, _, names in os.walk(root, topdown=False, onerror=_raise):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_folder(Path(folder))


def files_of(root: Path) -> Iterator[Path]:
    """Every file below root, sorted by path. Raises ValueError for links and special files, which a copy could lose."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders.sort()
        for name in sorted(folders + names):
            path = Path(folder) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is a link or a special file; write a plain file instead")
            if name in names:
                yield path


def _raise(error: OSError) -> None:
    raise error


def exchange(a: Path, b: Path) -> bool:
    """Swap two existing paths in one step. Returns False and does nothing if the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    # Whatever the reason for a failure, the caller then uses plain renames, which report what is wrong with the paths.
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0


class Fingerprint:
    """sha256 of a file; of a large file, only of its first and last MiB (its size is checked separately)."""

    WHOLE, EDGES = "sha256", "sha256_first_and_last_mib"

    def __init__(self, whole_up_to: int = 64 * MIB) -> None:
        """whole_up_to: bytes; larger files are not read completely."""
        self.whole_up_to = whole_up_to

    def of(self, path: Path) -> tuple[str, str]:
        """(kind, hex digest) of the file; the kind follows from its size."""
        kind = self.WHOLE if path.stat().st_size <= self.whole_up_to else self.EDGES
        return kind, self.digest(path, kind)

    @classmethod
    def digest(cls, path: Path, kind: str) -> str:
        """Hex digest of the given kind. ValueError for an unknown kind."""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            if kind == cls.WHOLE:
                while block := file.read(MIB):
                    digest.update(block)
            elif kind == cls.EDGES:
                digest.update(file.read(MIB))
                file.seek(max(0, os.fstat(file.fileno()).st_size - MIB))
                digest.update(file.read(MIB))
            else:
                raise ValueError(f"unknown kind of hash {kind!r}")
        return digest.hexdigest()


# --- temporary names: .<kind>-<name>-<host>-<pid>-<start>-<random>


def owned_name(kind: str, name: str) -> str:
    """A hidden temporary name for `name` that tells which process made it."""
    return f".{kind}-{name}-{_host()}-{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(4)}"


def leftovers(folder: Path, kinds: tuple[str, ...], name: str = "") -> list[Path]:
    """Paths in `folder` with a temporary name whose process is gone; only those of `name` if given."""
    middle = re.escape(name) if name else r".+"
    pattern = re.compile(rf"\.(?:{'|'.join(kinds)})-{middle}-([0-9a-f]{{8}})-(\d+)-(\d+)-[0-9a-f]{{8}}")
    found = []
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not _alive(path, match[1], int(match[2]), int(match[3])):
            found.append(path)
    return found


def _alive(path: Path, host: str, pid: int, start: int) -> bool:
    """Whether the process that made the path may still work on it."""
    if host != _host():
        return time.time() - _last_change(path) < FOREIGN_STALE_SECONDS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # Process numbers are used again, so a process is identified by its number and its start time.
    now = _start_time(pid)
    return start == 0 or now == 0 or now == start


def _last_change(root: Path) -> float:
    """Newest modification time in a tree, seconds since the epoch."""
    newest = 0.0
    paths = [root, *(Path(folder) / name for folder, subs, names in os.walk(root) for name in subs + names)]
    for path in paths:
        try:
            newest = max(newest, path.lstat().st_mtime)
        except FileNotFoundError:
            continue
    return newest


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _start_time(pid: int) -> int:
    """Clock ticks from boot to the start of the process; 0 where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The command's name is in parentheses and may hold anything, spaces included.
    return int(text.rpartition(")")[2].split()[19])


def remove_tree(path: Path) -> bool:
    """Delete a file, link or tree; a failure is logged and returned as False, never raised."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed and still takes up space: %s", path, error)
        return False
    return True
