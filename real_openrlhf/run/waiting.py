"""Waiting for actors, with a word now and then, and an end: a process that hangs gives no error by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from real_openrlhf.common.errors import RunError

logger = logging.getLogger(__name__)

# Seconds between two looks, and after which the log says what the run waits for.
_LOOK_S = 5.0
_TELL_S = 120.0


class Hung(TimeoutError):
    """Actors gave no sign for too long."""


def wait_for(refs: Any, what: str, limit_s: float | None = None, news: Callable[[], Any] | None = None) -> Any:
    """ray.get(refs). Hung when there is neither a result nor anything new for limit_s seconds; None: wait for ever.

    what: in words, for log and error. news: a value that changes while the actors get on, such as a number of answers.
    """
    look = _LOOK_S if limit_s is None else min(_LOOK_S, limit_s)
    last, since, told = None, time.monotonic(), time.monotonic()
    while True:
        try:
            return ray.get(refs, timeout=look)
        except ray.exceptions.GetTimeoutError as error:
            if isinstance(error, ray.exceptions.RayTaskError):
                raise  # an actor's own
        now = time.monotonic()
        found = last if news is None else news()
        if found != last:
            last, since, told = found, now, now
        if limit_s is not None and now - since >= limit_s:
            raise Hung(
                f"{what}: no sign of {_unfinished(refs)} for {limit_s:g} s (--ray.call_timeout). A process hangs, or "
                "the work takes longer than that; what libraries said, and py-spy dump on its node, show where it is."
            )
        if now - told >= _TELL_S:
            told = now
            logger.info("%s: still waiting for %s, %.0f s without news", what, _unfinished(refs), now - since)


def finished_requests(engines: Sequence[Any]) -> int | None:
    """Number of requests that the engines have answered so far; None when one of them does not say."""
    try:
        return int(sum(ray.get([engine.finished_requests.remote() for engine in engines], timeout=_LOOK_S)))
    except ray.exceptions.RayError:
        return None  # the call that is waited for says what is wrong


def _unfinished(refs: Any) -> str:
    if not isinstance(refs, list):
        return "the actor"
    return f"{len(ray.wait(refs, num_returns=len(refs), timeout=0)[1])} of {len(refs)} actors"


# What comes again when the same step is made again: mistakes in flags, data or code, and too little GPU memory.
_COME_AGAIN = (
    RunError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    AssertionError,
    NotImplementedError,
)


def is_fault(error: BaseException) -> bool:
    """Whether an error may go away when everything is started again: a process, node or connection lost, or hanging.

    Errors of the controller itself are none.
    """
    if isinstance(error, ray.exceptions.RayTaskError):
        cause: Any = error
        while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
            if isinstance(cause, _COME_AGAIN) or type(cause.cause).__name__ == "OutOfMemoryError":
                return False
            cause = cause.cause
        return not isinstance(cause, _COME_AGAIN)
    return isinstance(error, ray.exceptions.RayError | TimeoutError | ConnectionError)
