"""The folder of a run's checkpoints.

    <root>/step_20/             a checkpoint; complete iff manifest.json is there and every file matches it
    <root>/step_20.seq_2/       an earlier save of the same step, until rotation deletes it
    <root>/.tmp-step_40-.../    a save in progress
    <root>/.del-step_10-.../    a deletion in progress

Once there is a complete checkpoint, there is one at any time, under one of the first two names: also between two system
calls of a save. The store reads all that it knows from the manifests, so nothing is lost when the process dies.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from real_openrlhf.checkpoint.errors import CheckpointError, CheckpointWriteError, NoCheckpointError
from real_openrlhf.checkpoint.manifest import (
    MANIFEST_FILE,
    Checkpoint,
    CheckpointMeta,
    Manifest,
    find_defect,
    list_files,
)
from real_openrlhf.checkpoint.writer import CheckpointWriter
from real_openrlhf.common import durable
from real_openrlhf.common.paths import expand

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)(\.seq_\d+)?")


class CheckpointStore:
    """Saves, finds and rotates checkpoints. One process writes; any may read."""

    def __init__(
        self,
        root: str | Path,
        *,
        keep: int,
        keep_best: bool = True,
        metric_name: str = "metric",
        higher_is_better: bool = True,
        hash_whole_up_to: int = 64 * durable.MIB,
    ) -> None:
        """Does not touch the folder yet.

        keep               how many of the newest saves to keep, in addition to the best one
        keep_best          never delete the best by metric
        metric_name        metrics of another name are not compared
        hash_whole_up_to   bytes; of larger files only the size and the first and last MiB are checked
        """
        if type(keep) is not int or keep < 1:
            raise ValueError(f"the number of checkpoints to keep must be a whole number of at least 1, got {keep!r}")
        self.root = Path(expand(str(root)))
        self.keep = keep
        self.keep_best = keep_best
        self.metric_name = metric_name
        self.higher_is_better = higher_is_better
        self._fingerprint = durable.Fingerprint(hash_whole_up_to)
        self._opened = False
        self._warned: set[str] = set()

    # --- saving

    def open(self) -> CheckpointStore:
        """Make the folder, check that it can be written, remove leftovers of dead processes. CheckpointError if not."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / durable.owned_name("del", "probe")
            probe.mkdir()
            probe.rmdir()
            stale = durable.leftovers(self.root, ("tmp", "del"))
        except (FileExistsError, NotADirectoryError) as error:
            raise CheckpointError(
                f"{self.root} cannot be the checkpoint folder: it, or a folder above it, is a file"
            ) from error
        except PermissionError as error:
            raise CheckpointError(f"no permission to write checkpoints into {self.root}; choose another") from error
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be written into {self.root}: {error}") from error
        for path in stale:
            logger.info("removing %s, left by a process that ended while writing it", path)
            durable.remove_tree(path)
        self._opened = True
        return self

    def check_shared(self, sees: Callable[[str], Sequence[bool]]) -> None:
        """Check that all processes that will write here see this same folder; CheckpointError if one does not.

        sees: for a given path, says for each of these processes whether it exists there. Opens the store.
        """
        self.open()
        probe = self.root / durable.owned_name("del", "probe")
        probe.mkdir()
        try:
            blind = [rank for rank, there in enumerate(sees(str(probe))) if not there]
        finally:
            probe.rmdir()
        if blind:
            raise CheckpointError(
                f"ranks {blind} run on nodes that do not see {self.root}: checkpoints need a folder on a file system "
                "that all nodes share, at the same path; choose another"
            )

    def begin(self, step: int, meta: CheckpointMeta) -> CheckpointWriter:
        """Start a save; opens the store if necessary. CheckpointWriteError if not even a folder can be made."""
        if type(step) is not int or step < 0:
            raise ValueError(f"a step is a whole number of at least 0, got {step!r}")
        path = self.root / durable.owned_name("tmp", f"step_{step}")
        try:
            if not self._opened:
                self.open()
            path.mkdir()
        except (OSError, CheckpointError) as error:
            failure = CheckpointWriteError(f"the checkpoint of step {step} was not saved: {error}")
            logger.error("SAVE FAILED: %s", failure)
            raise failure from error
        return CheckpointWriter(path, step, lambda writer, metric: self._commit(writer, metric, meta))

    def _commit(self, writer: CheckpointWriter, metric: float | None, meta: CheckpointMeta) -> Checkpoint:
        if metric is not None and not math.isfinite(metric):
            logger.warning("%s is %s at step %d: saved as not measured", self.metric_name, metric, writer.step)
            metric = None
        if (writer.path / MANIFEST_FILE).exists():
            raise ValueError(f"{MANIFEST_FILE} is reserved, but was written into {writer.path}")
        durable.fsync_tree(writer.path)
        files = list_files(writer.path, self._fingerprint)
        if not files:
            raise ValueError("nothing was written into the checkpoint")
        others, _ = self._scan()
        manifest = Manifest(
            step=writer.step,
            sequence=1 + max((c.manifest.sequence for c in others), default=0),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            metric_name=self.metric_name,
            metric=None if metric is None else float(metric),
            best=False,
            meta=meta,
            files=files,
        )
        final = self.root / f"step_{writer.step}"
        ranked = self._ranked([*others, Checkpoint(path=final, manifest=manifest)])
        manifest = replace(manifest, best=bool(ranked) and ranked[0].manifest is manifest)
        durable.write_file(writer.path / MANIFEST_FILE, manifest.dumps(self._fingerprint))
        durable.fsync_folder(writer.path)
        self._install(writer.path, final)
        checkpoint = Checkpoint(path=final, manifest=manifest)
        logger.info("saved %s (%s %s%s)", final, self.metric_name, metric, ", the best" if manifest.best else "")
        self._rotate(manifest.sequence)
        return checkpoint

    def _install(self, temporary: Path, final: Path) -> None:
        """Rename into place. An earlier checkpoint of the same step gets a name under which it can still be found."""
        aside: Path | None = None
        if final.is_dir():
            aside = self.root / durable.owned_name("del", final.name)
            try:
                old = self._read(final)
                aside = self.root / f"{final.name}.seq_{old.manifest.sequence}"
            except CheckpointError as error:
                logger.warning("replacing a folder that is not a complete checkpoint: %s", error)
            os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except OSError:
            if aside is not None:
                os.rename(aside, final)
            raise
        try:
            durable.fsync_folder(self.root)
        except OSError as error:
            raise CheckpointWriteError(
                f"{final} is in place but may not survive a power failure ({error}); nothing older was deleted"
            ) from error
        if aside is not None and aside.name.startswith("."):
            durable.remove_tree(aside)

    def _rotate(self, newest: int) -> None:
        """Delete all but the newest `keep` checkpoints and the best one. newest: sequence of the last save."""
        complete, _ = self._scan()
        if not any(c.manifest.sequence == newest for c in complete):
            logger.error("the checkpoint just saved in %s cannot be read back; nothing older is deleted", self.root)
            return
        current = [c for c in complete if not _displaced(c, complete)]
        kept = {c.path for c in current[-self.keep :]}
        if self.keep_best:
            kept |= {c.path for c in self._ranked(complete)[:1]}
        for checkpoint in complete:
            if checkpoint.path not in kept:
                self._delete(checkpoint.path)

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint. It is renamed first, so that a crash leaves no partial checkpoint under its name."""
        hidden = self.root / durable.owned_name("del", path.name)
        try:
            os.rename(path, hidden)
        except OSError as error:
            logger.warning("%s could not be deleted and still takes up space: %s", path, error)
            return
        durable.remove_tree(hidden)

    # --- finding

    def complete(self) -> list[Checkpoint]:
        """Complete checkpoints in the order in which they were saved. Files are compared by size only."""
        return self._scan()[0]

    def best(self) -> Checkpoint | None:
        """The best of `complete` by metric, the earliest of equals; None when no metric was saved."""
        ranked = self._ranked(self.complete())
        return ranked[0] if ranked else None

    def newest(self, *, after: int) -> Checkpoint | None:
        """The last one whose sequence number is above `after`, every file compared with its hash. None without one."""
        for checkpoint in reversed(self.complete()):
            if checkpoint.manifest.sequence <= after:
                return None
            try:
                checkpoint.verify()
            except CheckpointError as error:
                self._pass_over(str(error))
                continue
            return checkpoint
        return None

    def find(self, which: str | Path) -> Checkpoint:
        """A complete checkpoint, every file compared with its hash.

        which: "latest" (saved last, whatever its step), "best", a path, or a name in the store.
        Broken checkpoints are skipped with a warning, unless one is asked for by path. Raises NoCheckpointError
        when there is no checkpoint at all, not even a broken one, else CheckpointError.
        """
        if which not in ("latest", "best"):
            return self._find_path(Path(expand(str(which))))
        complete, defects = self._scan()
        if not complete and not defects:
            raise NoCheckpointError(f"there is no checkpoint in {self.root}")
        order = complete[::-1] if which == "latest" else self._ranked(complete)
        for checkpoint in order:
            try:
                checkpoint.verify()
            except CheckpointError as error:
                self._pass_over(str(error))
                defects.append(str(error))
                continue
            return checkpoint
        if which == "best" and complete and not order:
            others = sorted({c.manifest.metric_name for c in complete if c.metric is not None})
            raise CheckpointError(
                f"no checkpoint in {self.root} has the metric {self.metric_name!r}"
                + (f", only {', '.join(map(repr, others))}" if others else "")
                + "; load the latest instead"
            )
        found = "".join(f"\n  {defect}" for defect in defects)
        raise CheckpointError(f"no complete checkpoint for {which!r} in {self.root}:{found}")

    def _find_path(self, path: Path) -> Checkpoint:
        try:
            if not path.exists() and (self.root / path).exists():
                path = self.root / path
            if path.is_file():
                raise CheckpointError(f"{path} is a file; give the folder of a checkpoint")
            if not path.is_dir():
                there = ", ".join(p.name for p in self._folders()) if self.root.is_dir() else ""
                raise CheckpointError(f"there is no checkpoint {path}; in {self.root} there is {there or 'none'}")
            inside = sorted(p.name for p in path.iterdir() if _NAME.fullmatch(p.name))
        except PermissionError as error:
            raise CheckpointError(f"no permission to read the checkpoint {path}") from error
        if inside and not (path / MANIFEST_FILE).exists():
            raise CheckpointError(f"{path} holds checkpoints but is not one; give one of them: {', '.join(inside)}")
        checkpoint = self._read(path)
        checkpoint.verify()
        return checkpoint

    def _scan(self) -> tuple[list[Checkpoint], list[str]]:
        """(complete checkpoints by sequence, what is wrong with the others); compares sizes only."""
        complete, defects = [], []
        for path in self._folders():
            try:
                complete.append(self._read(path))
            except CheckpointError as error:
                self._pass_over(str(error))
                defects.append(str(error))
        return sorted(complete, key=lambda c: (c.manifest.sequence, c.step)), defects

    def _folders(self) -> list[Path]:
        """All folders with the name of a checkpoint."""
        try:
            return sorted(path for path in self.root.iterdir() if _NAME.fullmatch(path.name))
        except FileNotFoundError:
            return []
        except NotADirectoryError as error:
            raise CheckpointError(f"{self.root} is a file; checkpoints need a folder") from error
        except OSError as error:
            raise CheckpointError(f"the checkpoints in {self.root} cannot be listed: {error}") from error

    @staticmethod
    def _read(path: Path) -> Checkpoint:
        if path.is_file():
            raise CheckpointError(f"{path} is a file, not the folder of a checkpoint")
        manifest = Manifest.read(path)
        defect = find_defect(path, manifest, hashes=False)
        if defect:
            raise CheckpointError(f"{path} is not a complete checkpoint: {defect}")
        return Checkpoint(path=path, manifest=manifest)

    def _ranked(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Checkpoints with the metric, best first; of equals the earlier one first, a displaced one last."""
        sign = -1.0 if self.higher_is_better else 1.0
        measured = [
            (sign * c.metric, _displaced(c, checkpoints), c.manifest.sequence, c)
            for c in checkpoints
            if c.metric is not None and c.manifest.metric_name == self.metric_name
        ]
        return [c for *_, c in sorted(measured, key=lambda row: row[:3])]

    def _pass_over(self, defect: str) -> None:
        if defect not in self._warned:
            self._warned.add(defect)
            logger.warning("skipping a checkpoint: %s", defect)


def _displaced(checkpoint: Checkpoint, among: Sequence[Checkpoint]) -> bool:
    """Whether the checkpoint's step was saved again later."""
    return any(c.step == checkpoint.step and c.manifest.sequence > checkpoint.manifest.sequence for c in among)
