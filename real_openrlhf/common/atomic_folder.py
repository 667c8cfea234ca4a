"""Writes folders atomically: the new folder replaces the old one completely, or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_openrlhf.common import durable
from real_openrlhf.common.errors import FolderError
from real_openrlhf.common.paths import expand

logger = logging.getLogger(__name__)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`; at the end of the block it takes the target's place.

    Where the file system can swap two folders in one step (Linux, local disks), `target` exists all the time.
    Elsewhere it is missing between two renames; if the process dies just then, the next `atomic_folder` or
    `repair_folder` brings the old one back. An exception in the block leaves the old folder as it was and is
    raised unchanged. Raises FolderError if the target is a file, or if its parent folder cannot be written.
    """
    target = _resolved(target)
    repair_folder(target)
    temporary = target.parent / durable.owned_name("tmp", target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except (FileExistsError, NotADirectoryError) as error:
        raise FolderError(f"{target} cannot be written: a folder above it is a file") from error
    except PermissionError as error:
        raise FolderError(f"no permission to write {target}") from error
    try:
        yield temporary
        durable.fsync_tree(temporary)
        old = _swap_in(temporary, target)
    except BaseException:
        durable.remove_tree(temporary)
        state = "is as it was before" if target.exists() else "was not written"
        logger.error("an export failed; %s %s", target, state)
        raise
    durable.fsync_folder(target.parent)
    if old is not None:
        durable.remove_tree(old)


def replace_folder(source: str | Path, target: str | Path) -> None:
    """Put a finished folder in the target's place, with the promises of `atomic_folder`. Both on one file system."""
    source, target = Path(source), _resolved(target)
    repair_folder(target)
    durable.fsync_tree(source)
    old = _swap_in(source, target)
    durable.fsync_folder(target.parent)
    if old is not None:
        durable.remove_tree(old)


def repair_folder(target: str | Path) -> None:
    """Clean up after a process that died while replacing `target`. Programs that read it may call this first."""
    target = _resolved(target)
    if not target.parent.is_dir():
        return
    try:
        displaced = durable.leftovers(target.parent, ("old",), target.name)
        if displaced and not target.exists():
            displaced.sort(key=lambda path: path.stat().st_mtime)
            newest = displaced.pop()
            logger.warning("bringing back %s: a process died while replacing it", target)
            os.rename(newest, target)
            durable.fsync_folder(target.parent)
        stale = [*displaced, *durable.leftovers(target.parent, ("tmp",), target.name)]
    except OSError as error:
        raise FolderError(f"{target} cannot be repaired: {error}") from error
    for path in stale:
        logger.info("removing %s, left by a process that ended while writing it", path)
        durable.remove_tree(path)


def _resolved(target: str | Path) -> Path:
    """The target of a link: that folder is replaced, the link stays."""
    path = Path(expand(str(target))).resolve()
    if path.exists() and not path.is_dir():
        raise FolderError(f"{path} is a file; give a folder")
    return path


def _swap_in(temporary: Path, target: Path) -> Path | None:
    """Put `temporary` in the place of `target`. Returns where the old folder is now; None when there was none."""
    if not target.exists():
        os.rename(temporary, target)
        return None
    if durable.exchange(temporary, target):
        return temporary
    old = target.parent / durable.owned_name("old", target.name)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    return old
