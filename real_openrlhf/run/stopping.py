"""A run that was asked to stop, and failed before it had saved: what it says instead of a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

from real_openrlhf.checkpoint.store import CheckpointStore
from real_openrlhf.common.errors import RunError, one_line

logger = logging.getLogger(__name__)
# Errors of Ray carry the traceback of another process.
_LONGEST = 400


@contextmanager
def in_plain_words(stop_requested: Callable[[], str | None], store: CheckpointStore) -> Iterator[None]:
    """Inside of it, a lost process after a stop signal is a RunError that says from where the run can go on.

    Slurm and other schedulers often send a run's actors away together with the run itself; that is no fault of it.
    """
    try:
        yield
    except (RayError, ConnectionError) as error:
        signal = stop_requested()
        if signal is None:
            raise
        logger.debug("after %s", signal, exc_info=error)
        raise RunError(f"{signal} asked this run to stop, {_lost(error)}. {_what_is_left(store)}") from error


def _lost(error: Exception) -> str:
    said = one_line(error)
    return f"but the step that was under way failed: {said if len(said) <= _LONGEST else said[:_LONGEST] + ' ...'}"


def _what_is_left(store: CheckpointStore) -> str:
    complete = store.complete()
    if not complete:
        return "There is no checkpoint yet (--ckpt.save_steps): the same command begins again"
    step = complete[-1].step
    return f"The newest checkpoint is of step {step}: the same command with --ckpt.load latest resumes from there"
