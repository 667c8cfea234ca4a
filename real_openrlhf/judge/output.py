"""Writes judgements: each row at once, into a file OUTPUT.partial, which is renamed to OUTPUT when it is complete."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.common.jsonl import JsonLines, keep_lines, read_lines
from real_openrlhf.common.paths import expand
from real_openrlhf.judge.types import RESULT, JudgeError

logger = logging.getLogger(__name__)

STANDARD = "-"


class Output:
    """done: rows that an earlier job has judged, in order, with their judgements; empty unless a job is resumed."""

    done: list[Mapping[str, Any]]

    def __init__(self, lines: JsonLines | None, done: list[Mapping[str, Any]]) -> None:
        self._lines = lines
        self.done = done
        self.written = len(done)

    def write(self, row: Mapping[str, Any]) -> None:
        if self._lines is None:
            sys.stdout.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            sys.stdout.flush()
        else:
            self._lines.write(row)
        self.written += 1

    def check_done(self, rows: list[Mapping[str, Any]]) -> None:
        """JudgeError unless the rows that are already judged are the first of `rows`."""
        for number, (line, row) in enumerate(zip(self.done, rows), start=1):
            if {name: value for name, value in line.items() if name != RESULT} != row:
                raise JudgeError(f"--resume: judged row {number} is not row {number} of --input; begin anew")
        if len(self.done) > len(rows):
            raise JudgeError(f"--resume: {len(self.done)} rows are judged, but --input has {len(rows)}; begin anew")


@contextmanager
def open_output(target: str, *, overwrite: bool, resume: bool, identity: Mapping[str, Any]) -> Iterator[Output]:
    """Open standard output ("-") or a .jsonl file. Rows that were judged before an error stay in <target>.partial.

    identity: what must be the same to resume from there. Raises JudgeError if the target exists, if an earlier job
    ended early and neither resume nor overwrite is set, and if that job had other settings; FolderError while another
    program writes there.
    """
    if target == STANDARD:
        if resume:
            raise JudgeError("--resume needs --output FILE.jsonl; a job on standard output cannot be resumed")
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Whatever the locale, and as a file has it: else a character that it lacks would end the job.
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        yield Output(None, [])
        return
    path = Path(expand(target))
    if path.suffix != ".jsonl":
        raise JudgeError(f"--output is a .jsonl file or -, got {target!r}")
    with FolderLock(path.parent, "--output", file=path):
        yield from _into(path, overwrite=overwrite, resume=resume, identity=identity)


def _into(path: Path, *, overwrite: bool, resume: bool, identity: Mapping[str, Any]) -> Iterator[Output]:
    if path.exists() and not overwrite:
        raise JudgeError(f"--output {path} exists; pass --overwrite to replace it")
    partial, about = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")
    done = _earlier(partial, about, identity) if resume else []
    if not resume and not overwrite and partial.exists() and partial.stat().st_size:
        raise JudgeError(
            f"{partial} holds rows of a job that ended early; pass --resume to continue, or --overwrite to begin anew"
        )
    write_text(about, json.dumps(dict(identity), ensure_ascii=False) + "\n")
    lines = JsonLines(partial, append=bool(done))
    output = Output(lines, done)
    try:
        yield output
    except BaseException:
        if output.written:
            logger.error("%d rows are in %s; the same command with --resume continues", output.written, partial)
        raise
    finally:
        lines.close()
    partial.replace(path)
    about.unlink(missing_ok=True)


def _earlier(partial: Path, about: Path, identity: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not partial.exists():
        return []
    try:
        before = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JudgeError(f"--resume: {about} cannot be read: {error}; pass --overwrite to begin anew") from error
    now = json.loads(json.dumps(dict(identity)))
    differs = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differs:
        raise JudgeError(
            f"--resume: the job that ended early had another {', '.join(differs)}; begin anew with --overwrite"
        )
    keep_lines(partial)
    return [line for _, line in read_lines(partial)]
