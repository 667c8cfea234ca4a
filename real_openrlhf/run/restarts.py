"""A run that goes on after a fault: everything is started again, from the last checkpoint.

One way for all faults of processes, nodes and connections, and the one by which a run resumes after it was killed: it
ends as an undisturbed run does. The controller's process must live; if it dies, `--ckpt.load auto` does the same.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from real_openrlhf.checkpoint.errors import CheckpointError
from real_openrlhf.checkpoint.manifest import Checkpoint
from real_openrlhf.common.device import DeviceError
from real_openrlhf.common.errors import RunError
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.controller.checkpointing import make_store
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.controller.output_folder import RunLogError
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.plan import RunPlan
from real_openrlhf.run.signals import StopRequest
from real_openrlhf.run.waiting import is_fault

logger = logging.getLogger(__name__)

# Seconds before the second start in a row; twice as many before the third.
_PAUSE_S = 30.0


class Interrupted(Exception):
    """A fault ended an attempt that had begun. The fault is its cause.

    step: the last complete one.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


@dataclass(frozen=True, kw_only=True)
class Again:
    """An attempt that is not the first. why: what interrupted the one before. where: what it starts from, in words."""

    why: str
    where: str


def launch_until_done(
    plan: RunPlan, checkpoint: Checkpoint | None, launch: Callable[..., Any], kept: KeptEngines | None = None
) -> None:
    """Call launch(plan, checkpoint, kept, stop=..., again=None); after a fault with the last checkpoint and Again(...).

    At most --ckpt.max_restarts times without a new checkpoint; then the fault is raised. A fault of the very first
    start is raised at once: it would come again. Raises Stopped when there was a stop signal before the next start,
    whether it came before the fault or after it.
    """
    stop = StopRequest()
    try:
        _until_done(plan, checkpoint, launch, kept, stop)
    finally:
        stop.release()


def _until_done(
    plan: RunPlan,
    checkpoint: Checkpoint | None,
    launch: Callable[..., Any],
    kept: KeptEngines | None,
    stop: StopRequest,
) -> None:
    ckpt = plan.config.ckpt
    # In a Ray session of the caller, actors of a failed attempt live on, and so may an engine that is broken.
    limit = 0 if kept is not None else ckpt.max_restarts
    store = make_store(ckpt.folder, keep=ckpt.max_num, metric=ckpt.best_metric)
    # What was there before belongs to another course of the run, even if its step is higher.
    before = max((c.manifest.sequence for c in store.complete()), default=0)
    first, restarts = checkpoint, 0
    again: Again | None = None
    fault: BaseException | None
    step: int | None
    while True:
        try:
            launch(plan, checkpoint, kept, stop=stop, again=again)
            return
        except Interrupted as interrupted:
            fault, step = interrupted.__cause__, interrupted.step
        except Exception as error:
            # A node that is gone may be missed here; the first start said that there are enough.
            if again is not None and isinstance(error, (ConfigError, RunLogError, CheckpointError)):
                # By itself it is a mistake of the input, of a run that has not begun.
                raise RunError(f"the run cannot go on: {error}") from error
            if again is None or not (is_fault(error) or isinstance(error, DeviceError)):
                raise
            fault, step = error, None if checkpoint is None else checkpoint.step
        assert fault is not None
        newest = store.newest(after=before) or first
        restarts = restarts + 1 if newest == checkpoint else 1
        if stop.requested is not None:
            logger.error("%s, and a fault: %s", stop.requested, fault)
            raise _stopped(stop.requested, newest) from fault
        if restarts > limit:
            if restarts > 1:
                logger.error("no further start: %d in a row came to no new checkpoint", restarts)
            if isinstance(fault, DeviceError):
                raise RunError(f"the run cannot go on: {fault}") from fault
            raise fault
        checkpoint = newest
        where = "the beginning" if newest is None else str(newest.path)
        again = Again(why=_in_words(fault, step), where=where)
        logger.error("%s; start %d of %d from %s", again.why, restarts, limit, where, exc_info=fault)
        # Its frames hold handles of actors that are gone: they go before another cluster is there.
        del fault
        gc.collect()
        # The first one comes at once. When it did not help, what was lost needs time to come back.
        pause(_PAUSE_S * (restarts - 1), stop)
        if stop.requested is not None:
            raise _stopped(stop.requested, newest)


def pause(seconds: float, stop: StopRequest) -> None:
    """Until the seconds are over, or a stop signal comes."""
    until = time.monotonic() + seconds
    while stop.requested is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(0.5, left))


def _stopped(signal: str, newest: Checkpoint | None) -> Stopped:
    return Stopped(0 if newest is None else newest.step, signal, saved=newest is not None)


def _in_words(fault: BaseException, step: int | None) -> str:
    place = "at the start" if step is None else f"after step {step}"
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    # Of Ray's errors, the traceback comes first and the error last.
    return f"a fault {place}: {type(fault).__name__}: {lines[-1] if lines else 'no message'}"
