"""The folder that a run writes into: the names of its files, and whether it may be used."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from real_openrlhf.common.errors import FolderError
from real_openrlhf.common.folder_lock import LOCK_FILE, FolderLock

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# Of a warm-up: feedback that a model wrote, and TRACT's first stage.
FEEDBACK_FILE = "feedback.jsonl"
STAGE_1 = "stage_1"
# What libraries said (run.library_log).
LIBRARIES_FILE = "libraries.log"
# What may lie in an output folder before its records begin.
BEFORE_RECORDS = frozenset({LOCK_FILE, FEEDBACK_FILE, STAGE_1, LIBRARIES_FILE})
SAMPLES_FILE = "samples.jsonl"
WARNINGS_FILE = "warnings.jsonl"
# The page of a run (controller.report).
REPORT_FILE = "report.html"
# Not config.json: the trained model may be saved into the same folder.
CONFIG_FILE = "run_config.json"


class RunLogError(ValueError):
    """The run cannot be recorded as asked; raised before training starts."""


def check_output_dir(output_dir: str | Path, *, append: bool = False, overwrite: bool = False) -> Path:
    """Make the directory and check that it can be written. One with files in it is refused, except:

    append     it holds the records of this run, which are continued
    overwrite  its records are started anew
    """
    path = Path(output_dir)
    if append and overwrite:
        raise RunLogError("a run either continues an output directory or overwrites it, not both")
    make_writable(path, "--ckpt.output_dir")
    if append and not (path / METRICS_FILE).is_file():
        logger.warning("%s holds no %s: the records start here", path, METRICS_FILE)
    names = sorted(p.name for p in path.iterdir() if p.name not in BEFORE_RECORDS)
    if not append and not overwrite and names:
        found = ", ".join(names[:5])
        raise RunLogError(
            f"--ckpt.output_dir {str(path)!r} is not empty ({found}); choose a new directory, "
            "continue that run, or ask for it to be overwritten"
        )
    return path


def lock_folder(output_dir: str | Path) -> FolderLock:
    try:
        return FolderLock(output_dir, "--ckpt.output_dir")
    except FolderError as error:
        raise RunLogError(str(error)) from error


def make_writable(path: Path, flag: str) -> None:
    if path.exists() and not path.is_dir():
        raise RunLogError(f"{flag} {str(path)!r} is a file; give a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise RunLogError(f"{flag} {str(path)!r} cannot be written: {error.strerror or error}") from error
