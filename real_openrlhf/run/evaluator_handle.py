"""The evaluator actor as the controller's `Evaluator`. If it dies, another one takes its place and judges again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from real_openrlhf.evals.change import EvalReport
from real_openrlhf.run.waiting import Hung, finished_requests, wait_for

logger = logging.getLogger(__name__)

# Evaluators that may die in one evaluation.
_LIVES = 3
# Seconds between two questions to engines whether they are idle.
_IDLE_S = 0.2


class RayEvaluator:
    """
    start    starts an evaluator actor
    engines  those that it asks
    total    answers of an evaluation
    """

    def __init__(
        self,
        start: Callable[[], Any],
        engines: Sequence[Any],
        *,
        total: int,
        call_timeout_s: float | None = None,
    ) -> None:
        self._start = start
        self.actor = start()
        self.engines = list(engines)
        self.total = total
        self.call_timeout_s = call_timeout_s
        self._running: Any = None
        self._version = -1
        self._before = 0
        # The first evaluation, kept here too: an evaluator that takes the place of a dead one needs it.
        self._state: dict[str, Any] | None = None

    def start(self, version: int) -> None:
        self._before = finished_requests(self.engines) or 0
        self._version = version
        self._running = self.actor.evaluate.remote(version)

    def result(self, watch: Callable[[int, int], None] | None = None) -> EvalReport:
        for lives in reversed(range(_LIVES)):
            try:
                report = self._report(watch)
                if self._state is None:
                    self._state = ray.get(self.actor.state_dict.remote(), timeout=self.call_timeout_s)
                return report
            except ray.exceptions.RayActorError as error:
                # In a task's error it is an engine that died.
                if isinstance(error, ray.exceptions.RayTaskError) or not lives:
                    raise
                logger.warning("the evaluator died; evaluation %d is repeated by another: %s", self._version, error)
                self._take_its_place()
        raise AssertionError("unreachable")

    def _report(self, watch: Callable[[int, int], None] | None) -> EvalReport:
        def answers() -> int | None:
            found = finished_requests(self.engines)
            if found is not None and watch is not None:
                # Requests after a forced anchor are not in the total, so the count may exceed it.
                watch(min(found - self._before, self.total), self.total)
            return found

        return wait_for(self._running, f"evaluation {self._version}", self.call_timeout_s, answers)

    def _take_its_place(self) -> None:
        # What the dead one asked for is still being answered. Requests beside others would be batched differently.
        since = time.monotonic()
        while any(ray.get([engine.in_flight.remote() for engine in self.engines], timeout=self.call_timeout_s)):
            if self.call_timeout_s is not None and time.monotonic() - since > self.call_timeout_s:
                raise Hung(f"engines are still busy {self.call_timeout_s:g} s after the evaluator died")
            time.sleep(_IDLE_S)
        self.actor = self._start()
        if self._state is not None:
            ray.get(self.actor.load_state_dict.remote(self._state), timeout=self.call_timeout_s)
        self.start(self._version)

    def end(self) -> None:
        ray.kill(self.actor)

    def state_dict(self) -> dict[str, Any]:
        return self._state or {"start": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Checkpoints of earlier versions do not have it.
        self._state = state if state.get("start") else None
        ray.get(self.actor.load_state_dict.remote(state), timeout=self.call_timeout_s)
