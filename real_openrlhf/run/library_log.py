"""What libraries say while a run lasts (vLLM, DeepSpeed, Ray, transformers) goes to a file; the run's own lines stay.

Ray prints what actors write through the driver's sys.stdout and sys.stderr. Lines of this package are marked in the
actors, and pass.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import ray

PACKAGE = "real_openrlhf"
MARK = f"[{PACKAGE}]"
# Of the file, shown when a run fails.
LAST_LINES = 40

# Ray's, of the name of an actor.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

logger = logging.getLogger(__name__)


@contextmanager
def library_log(path: Path, *, append: bool) -> Iterator[TextIO]:
    """Yields the terminal's stream, for bars. OSError when the file cannot be opened."""
    out, err = sys.stdout, sys.stderr
    with ExitStack() as held:
        file = path.open("a" if append else "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        held.callback(_close, file)
        streams = [_Divided(stream, file) for stream in (out, err)]
        for stream in streams:
            held.callback(stream.pass_on)
        held.callback(_restore, out, err, threading.excepthook)
        sys.stdout, sys.stderr = streams  # type: ignore[assignment]
        threading.excepthook = _thread_failed
        held.enter_context(_records_divided(streams[1]))
        yield err


def _close(file: TextIO) -> None:
    with suppress(OSError):  # what a full disk did not take is on the terminal
        file.close()


def _restore(out: TextIO, err: TextIO, hook: Any) -> None:
    sys.stdout, sys.stderr, threading.excepthook = out, err, hook


def _thread_failed(args: Any) -> None:
    """An error of this process, which must not be looked for in a file."""
    name = args.thread.name if args.thread is not None else "a thread"
    logger.error("%s failed", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


@contextmanager
def _records_divided(stream: _Divided) -> Iterator[None]:
    """Log records of this process: this package's, and errors, where they went before; all others to the stream."""
    from transformers.utils import logging as transformers_logging

    def shown(record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] == PACKAGE or record.levelno >= logging.ERROR

    root = logging.getLogger()
    before = list(root.handlers)
    to_file = logging.StreamHandler(stream)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s", datefmt="%H:%M:%S"))
    to_file.addFilter(lambda record: not shown(record))
    for handler in before:
        handler.addFilter(shown)
    root.addHandler(to_file)
    logging.captureWarnings(True)
    # It has a handler of its own, which writes to the terminal since it was imported.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    try:
        yield
    finally:
        transformers_logging.disable_propagation()
        transformers_logging.enable_default_handler()
        logging.captureWarnings(False)
        root.removeHandler(to_file)
        for handler in before:
            handler.removeFilter(shown)


class _Divided(io.TextIOBase):
    """In place of sys.stdout or sys.stderr: marked lines go to it, all others to the file."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self._terminal, self._file = terminal, file
        self._lock = threading.RLock()
        # By thread: print() writes a line and its end apart, and another thread may come between.
        self._begun: dict[int, str] = {}
        self._open = True

    def write(self, text: str) -> int:
        with self._lock:
            if not self._open:
                return self._terminal.write(text)
            thread = threading.get_ident()
            *lines, begun = (self._begun.pop(thread, "") + text).replace("\r", "\n").split("\n")
            if begun:
                self._begun[thread] = begun
            for line in lines:
                self._line(line + "\n")
        return len(text)

    def _line(self, line: str) -> None:
        if MARK not in line:
            try:
                self._file.write(_COLOUR.sub("", line))
                return
            except OSError:
                pass  # a full disk: better too much on the terminal than nothing anywhere
        self._terminal.write(line)

    def pass_on(self) -> None:
        """From now on everything goes to the terminal: who has kept this stream may still write."""
        with self._lock:
            for begun in self._begun.values():
                self._line(begun + "\n")
            self._open = False
            self._begun.clear()

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return not self._open and self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding or "utf-8"


class _Marked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Every line of it, of a traceback too: each is looked at by itself."""
        return "\n".join(f"{MARK} {record.levelname[0]} {line}" for line in super().format(record).splitlines())


def mark_own_lines() -> None:
    """In an actor: warnings and errors of this package are written so that the driver shows them. Else nothing."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    package = logging.getLogger(PACKAGE)
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Marked("%(message)s"))
    package.addHandler(handler)
    package.propagate = False


def written_at(path: Path) -> int | None:
    """When the file was last written to, for `last_lines`; None without one."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def last_lines(path: Path, since: int | None = None) -> str:
    """The end of the file, for a run that failed; says where the rest is.

    since: `written_at` when the run began. A file that is as it was then holds lines of an earlier run: nothing.
    """
    if since is not None and written_at(path) == since:
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = deque(file, maxlen=LAST_LINES)
    except OSError:
        return ""
    if not lines:
        return ""
    return f"the last lines of libraries (all of them: {path}):\n" + "".join(f"  {line}" for line in lines)
