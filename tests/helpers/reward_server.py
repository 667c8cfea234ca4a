"""The reward server in this process, asked by another thread, ended by a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.judge.cli_args import check, parse_args
from real_openrlhf.judge.cli_tools import reward_model
from real_openrlhf.judge.rewards.server import MakeCommand, serve_rewards


@contextmanager
def signal_handlers() -> Iterator[None]:
    """Those of the tests, put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_until(
    words: Sequence[str],
    ask: Callable[[httpx.Client], Any],
    *,
    number: int = signal.SIGTERM,
    make_command: MakeCommand | None = None,
) -> tuple[int | str | None, Any]:
    """Serve with these flags until `ask` has returned. -> (exit code, what it returned)

    make_command: instead of vLLM's own.
    """
    port, answers = free_port(), []
    args = parse_args(["serve", "--rewards", "--port", str(port), *words])
    check(args)

    def watch() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    threading.Event().wait(0.05)
            try:
                answers.append(ask(client))
            except BaseException as error:
                answers.append(error)
        os.kill(os.getpid(), number)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    with signal_handlers(), pytest.raises(SystemExit) as left:
        if make_command is None:
            reward_model(args)
        else:
            serve_rewards(args, make_command)
    watching.join()
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return left.value.code, answers[0]
