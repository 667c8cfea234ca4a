"""Calls to an engine end when its process does.

vLLM's client learns that the engine's process has died, but it fails only requests for tokens: who waits for a pause, a
weight sync or a sleep would wait for ever.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_EVERY_S = 0.5
# Looks for the death of a process after a call to it has failed.
_LOOKS = 10


class EngineDied(RuntimeError):
    """The engine's process ended while the run still needs it."""


async def while_alive(work: Coroutine[Any, Any, T], died: Callable[[], bool], what: str) -> T:
    """The result of `work`. EngineDied once `died()` is true; the work is then cancelled and not waited for."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_EVERY_S))[0]:
            if died():
                raise EngineDied(_message(what))
        error = task.exception()
        if type(error) is Exception:
            # What vLLM makes of any failed call but a request's. A process cancels its calls as it ends: the answer can
            # be here before vLLM knows of the end.
            for _ in range(_LOOKS):
                if died():
                    break
                await asyncio.sleep(_EVERY_S)
        if error is not None and died() and not isinstance(error, EngineDied):
            # vLLM's own word for it cannot be read in processes that do not import vLLM.
            raise EngineDied(f"{_message(what)} ({type(error).__name__})") from None
        return task.result()
    finally:
        task.cancel()


def needs_engine(method: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
    """Of a class with a vLLM engine `llm`: the method raises EngineDied when the engine's process has ended."""

    @functools.wraps(method)
    async def call(self: Any, *args: Any, **kwargs: Any) -> T:
        return await while_alive(method(self, *args, **kwargs), lambda: self.llm.errored, method.__name__)

    return call


def _message(what: str) -> str:
    return f"the engine's process ended during {what}: killed, short of memory, or an error that libraries.log shows"
