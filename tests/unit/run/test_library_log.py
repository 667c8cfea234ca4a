"""While a run lasts, its own lines are on the terminal and those of libraries in a file; nothing is lost."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from real_openrlhf.run import library_log as module
from real_openrlhf.run.library_log import LAST_LINES, MARK, last_lines, library_log

Begin = Callable[[], io.StringIO]
OURS = logging.getLogger("real_openrlhf.controller.progress")
THEIRS = logging.getLogger("some_library.part")


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """begin(): a terminal as sys.stderr and sys.stdout, with a root handler on it as a command makes one.

    To be called in the test: pytest puts its own streams there between a fixture and its test.
    """
    stream, root = io.StringIO(), logging.getLogger()
    level, handler = root.level, logging.StreamHandler(stream)

    def call() -> io.StringIO:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        return stream

    yield call
    root.removeHandler(handler)
    root.setLevel(level)


def test_whose_line_goes_where(begin: Begin, tmp_path: Path) -> None:
    terminal = begin()
    path = tmp_path / "libraries.log"
    hook = threading.excepthook
    with library_log(path, append=False) as stream:
        assert stream is terminal
        OURS.info("step 1/2")
        THEIRS.info("started")
        THEIRS.error("this is an error")
        print("(Engine pid=1) INFO vllm started", file=sys.stderr)
        print("\x1b[36m(Engine pid=1)\x1b[0m progress")
        print(f"(Rank pid=2) {MARK} W rank 1 is new", file=sys.stderr)
        warnings.warn("an old function", FutureWarning, stacklevel=1)
        transformers_logging.get_logger("transformers.generation").warning("a setting is ignored")
        sys.stderr.write("no line ")
        sys.stderr.write("break yet")
    shown = terminal.getvalue()
    assert shown.splitlines() == ["step 1/2", "this is an error", f"(Rank pid=2) {MARK} W rank 1 is new"]
    kept = path.read_text()
    for text in (
        *("I some_library.part started", "(Engine pid=1) INFO vllm started", "an old function"),
        *("\n(Engine pid=1) progress\n", "W transformers.generation a setting is ignored", "no line break yet\n"),
    ):
        assert text in kept
    assert "step 1/2" not in kept and "rank 1" not in kept
    # As before.
    assert sys.stderr is terminal and threading.excepthook is hook
    THEIRS.info("after")
    assert terminal.getvalue() == shown + "after\n"


def test_a_run_that_goes_on_adds_to_the_file(begin: Begin, tmp_path: Path) -> None:
    begin()
    path = tmp_path / "libraries.log"
    for append, want in ((False, ["a"]), (True, ["a", "a"]), (False, ["a"])):
        with library_log(path, append=append):
            print("a")
        assert path.read_text().split() == want


def test_who_kept_the_stream_writes_to_the_terminal_afterwards(begin: Begin, tmp_path: Path) -> None:
    terminal = begin()
    with library_log(tmp_path / "l", append=False):
        kept = sys.stderr
        print("inside", file=kept)
    print("outside", file=kept, flush=True)
    assert terminal.getvalue() == "outside\n" and (tmp_path / "l").read_text() == "inside\n"


def test_errors_reach_the_terminal_whatever_happens(begin: Begin, tmp_path: Path) -> None:
    terminal = begin()

    def fails() -> None:
        raise KeyError("in a thread")

    with pytest.raises(RuntimeError, match="the run"), library_log(tmp_path / "l", append=False):
        thread = threading.Thread(target=fails, name="watch")
        thread.start()
        thread.join()
        print("the cause")
        raise RuntimeError("the run")
    assert "watch failed" in terminal.getvalue() and "KeyError: 'in a thread'" in terminal.getvalue()
    assert sys.stderr is terminal and (tmp_path / "l").read_text() == "the cause\n"


def test_a_full_disk_loses_nothing(begin: Begin, tmp_path: Path) -> None:
    terminal = begin()
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with library_log(Path("/dev/full"), append=True):
        print("a line")
    assert "a line\n" in terminal.getvalue()


def test_threads_write_whole_lines(begin: Begin, tmp_path: Path) -> None:
    terminal = begin()

    turn = threading.Barrier(2)

    def write(name: str) -> None:
        for i in range(200):
            sys.stderr.write(f"{name} {i}" if i % 2 else f"{MARK} {name} {i}")
            turn.wait()  # both lines are begun, neither is ended
            sys.stderr.write("\n")

    with library_log(tmp_path / "l", append=False):
        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shown, kept = terminal.getvalue().splitlines(), (tmp_path / "l").read_text().splitlines()
    assert sorted(shown) == sorted(f"{MARK} {name} {i}" for name in "ab" for i in range(0, 200, 2))
    assert sorted(kept) == sorted(f"{name} {i}" for name in "ab" for i in range(1, 200, 2))


def test_what_no_thread_ended_is_kept(begin: Begin, tmp_path: Path) -> None:
    begin()
    with library_log(tmp_path / "l", append=False):
        thread = threading.Thread(target=sys.stderr.write, args=("of a thread",))
        thread.start()
        thread.join()
        sys.stderr.write("of this one")
    assert (tmp_path / "l").read_text() == "of a thread\nof this one\n"


class Actor:
    def get_actor_id(self) -> str | None:
        return "1"


@pytest.fixture
def in_an_actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(module.ray, "get_runtime_context", Actor)
    package = logging.getLogger("real_openrlhf")
    before = list(package.handlers), package.propagate
    yield
    package.handlers, package.propagate = before[0], before[1]


def test_an_actors_own_warnings_are_marked_line_by_line(in_an_actor: None, begin: Begin) -> None:
    terminal = begin()
    module.mark_own_lines()
    terminal.truncate(0)
    terminal.seek(0)
    OURS.info("not of interest")
    OURS.warning("rank %d is new", 1)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        OURS.exception("the plots could not be drawn")
    first, *trace = terminal.getvalue().splitlines()
    assert first == f"{MARK} W rank 1 is new"
    assert len(trace) > 4 and all(line.startswith(f"{MARK} E ") for line in trace)
    assert trace[0].endswith("the plots could not be drawn") and trace[-1] == f"{MARK} E lines"


def test_elsewhere_nothing_is_marked() -> None:
    package = logging.getLogger("real_openrlhf")
    before = list(package.handlers), package.propagate
    module.mark_own_lines()
    assert (list(package.handlers), package.propagate) == before


def test_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "l"
    assert last_lines(path) == ""
    path.write_text("")
    assert last_lines(path) == ""
    path.write_text("".join(f"{i}\n" for i in range(100)))
    head, *rest = last_lines(path).splitlines()
    assert str(path) in head and rest == [f"  {i}" for i in range(100 - LAST_LINES, 100)]
