"""Where a step's groups come from: collected when they are asked for, or while the step before trains.

One step ahead, the engines sample batch n + 1 with weights n, while the policy trains on batch n and makes weights
n + 1. At most one batch is being collected at a time, and none while weights change: the controller waits for it before
the weight sync.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from real_openrlhf.controller.dynamic_sampling import Collected, PromptSource


class PromptStore(PromptSource, Protocol):
    """Prompts whose position can be saved and restored."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """
    collected  the groups of one step
    version    of the weights that sampled them
    seconds    how long collecting took
    """

    collected: Collected
    version: int
    seconds: float


class BatchSource:
    """Gives the batch of each step. Its saved state is that of the prompts as if no batch had been collected ahead.

    collect: (step, weight version) -> the groups that this step trains on. It draws from `prompts`.
    """

    def __init__(self, prompts: PromptStore, collect: Callable[[int, int], Collected]) -> None:
        self.prompts = prompts
        self._collect = collect
        self._ahead: Future[Batch] | None = None
        self._before: dict[str, Any] | None = None

    def start(self, step: int, version: int) -> None:
        """Begin to collect the batch of `step` in the background. An error is raised later, by `take`."""
        if self._ahead is not None:
            raise RuntimeError("a batch is already collected ahead")
        self._before = self.prompts.state_dict()
        self._ahead = ahead = Future[Batch]()

        def work() -> None:
            try:
                ahead.set_result(self._timed(step, version))
            except BaseException as error:
                ahead.set_exception(error)

        # A daemon thread: it must not keep the process alive when training has failed.
        threading.Thread(target=work, daemon=True, name="rollouts").start()

    def wait(self) -> None:
        """Return once nothing is being collected."""
        if self._ahead is not None:
            self._ahead.exception()

    def take(self, step: int, version: int) -> Batch:
        """The batch of `step`: the one collected ahead, or one collected now by weights `version`."""
        ahead, self._ahead, self._before = self._ahead, None, None
        return self._timed(step, version) if ahead is None else ahead.result()

    def _timed(self, step: int, version: int) -> Batch:
        start = time.perf_counter()
        collected = self._collect(step, version)
        return Batch(collected=collected, version=version, seconds=time.perf_counter() - start)

    def state_dict(self) -> dict[str, Any]:
        """State of the prompts; with a batch collected ahead, the state before it: a resumed run draws it again."""
        return self.prompts.state_dict() if self._before is None else self._before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; a batch that was collected ahead is thrown away."""
        self.wait()
        self._ahead = self._before = None
        self.prompts.load_state_dict(state)
