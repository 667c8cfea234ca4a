from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from real_openrlhf.run.signals import EXIT_RESUME, STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def no_signal_kills_the_tests() -> Iterator[None]:
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def _raise(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_is_logged_once(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    with StopRequest() as stop:
        assert stop.requested is None
        _raise(number)
        assert stop.requested == number.name
        assert [r.getMessage() for r in caplog.records] == [
            f"{number.name}: saving at the end of this step, then exiting with code 85"
        ]
        _raise(number)
        assert stop.requested == number.name
        assert "ignored" in caplog.records[1].getMessage() and len(caplog.records) == 2
    assert stop.requested == number.name


def test_the_first_kind_counts(caplog: pytest.LogCaptureFixture) -> None:
    with StopRequest() as stop:
        _raise(signal.SIGUSR1)
        _raise(signal.SIGTERM)
        assert stop.requested == "SIGUSR1"
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "ignored" not in caplog.text


def test_handlers_are_put_back_even_after_an_exception() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with pytest.raises(ValueError), StopRequest() as stop:
        _raise(signal.SIGTERM)
        raise ValueError
    assert seen == [] and stop.requested == "SIGTERM"
    _raise(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_a_handler_installed_meanwhile_stays() -> None:
    def other(number: int, frame: object) -> None: ...

    with StopRequest():
        signal.signal(signal.SIGTERM, other)
    assert signal.getsignal(signal.SIGTERM) is other


def test_it_can_be_used_again_but_not_twice_at_once() -> None:
    stop = StopRequest()
    with stop:
        _raise(signal.SIGTERM)
        with pytest.raises(RuntimeError, match="in use already"):
            stop.__enter__()
    with stop:
        assert stop.requested is None
        _raise(signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_outside_of_the_main_thread() -> None:
    errors: list[str] = []

    def body() -> None:
        try:
            with StopRequest():
                pass
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in errors[0]


def test_a_process_that_is_stopped_ends_with_the_documented_code() -> None:
    code = (
        "import sys\n"
        "from real_openrlhf.run.signals import EXIT_RESUME, StopRequest\n"
        "with StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    sys.exit(EXIT_RESUME if stop.requested == 'SIGTERM' else 1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate("go on\n")
    assert process.returncode == EXIT_RESUME == 85
