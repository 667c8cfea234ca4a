"""What a person sees of a run: a bar on a terminal, one log line per step elsewhere, and phase times."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

import psutil
from tqdm import tqdm

logger = logging.getLogger(__name__)

# What is shown, in this order: name on the bar, name of the metric, format.
SHOWN = (
    ("reward", "reward/mean", ".3f"),
    ("|E-y|", "score/abs_error", ".3f"),
    ("mass", "score/mass", ".2f"),
    ("invalid", "invalid/rate", ".1%"),
    ("grad", "policy/grad_norm", ".2e"),
    ("tok/s", "speed/generated_tokens_per_second", ".0f"),
)
WARMUP_SHOWN = (
    ("cross-entropy", "loss/cross_entropy", ".4f"),
    ("|E-y|", "policy/abs_error", ".3f"),
    ("mass", "policy/mass", ".2f"),
    ("grad", "policy/grad_norm", ".2e"),
    ("tok/s", "speed/trained_tokens_per_second", ".0f"),
)
EVAL_METRIC = "expected/pearson"
# Least seconds between two log lines about a running evaluation.
JUDGED_EVERY_S = 30.0


class Progress:
    """A bar over steps. enabled=False shows nothing at all.

    Metrics that a step does not have are left out; an undefined one (None) is shown as "-".
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        enabled: bool = True,
        shown: Sequence[tuple[str, str, str]] = SHOWN,
        eval_metric: str = EVAL_METRIC,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total = total
        self.enabled = enabled
        self.shown = shown
        self.eval_metric = eval_metric
        self._step = initial
        self._eval: float | None = None
        self._has_eval = False
        self._clock = clock
        # The running evaluation: when it was first reported, with how many responses, and when it was last logged.
        self._judging: tuple[float, int] | None = None
        self._logged = 0.0
        stream = sys.stderr if stream is None else stream
        self._bar: tqdm | None = None
        if enabled and stream.isatty():
            self._bar = tqdm(total=total, initial=initial, desc="REAL", unit="step", file=stream, dynamic_ncols=True)

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Step `step` (counted from 1) is done."""
        if not self.enabled:
            return
        text = self._text(metrics)
        if self._bar is None:
            logger.info("step %d/%d  %s", step, self.total, text)
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        self._step = step

    def judged(self, step: int, done: int, total: int) -> None:
        """The evaluation after `step` has `done` of its `total` responses."""
        if not self.enabled:
            return
        now = self._clock()
        if self._judging is None:
            self._judging, self._logged = (now, done), now - JUDGED_EVERY_S
        since, first = self._judging
        rate = f", {(done - first) / (now - since):.1f} judgements/s" if now > since else ""
        if self._bar is not None:
            self._bar.set_postfix_str(f"evaluating {done}/{total}{rate}")
        elif now - self._logged >= JUDGED_EVERY_S:
            self._logged = now
            logger.info("step %d/%d  evaluating %d/%d%s", step, self.total, done, total, rate)

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """An evaluation after `step` is done; its correlation stays on the bar."""
        self._judging = None
        self._eval, self._has_eval = metrics.get(self.eval_metric), True
        if self.enabled and self._bar is None:
            logger.info("step %d/%d  eval %s %s", step, self.total, self.eval_metric, _format(self._eval, ".3f"))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _text(self, metrics: Mapping[str, float | None]) -> str:
        parts = [f"{label} {_format(metrics[name], spec)}" for label, name, spec in self.shown if name in metrics]
        if self._has_eval:
            parts.append(f"eval {self.eval_metric.rsplit('/', 1)[-1]} {_format(self._eval, '.3f')}")
        return "  ".join(parts)


def process_seconds() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


class PhaseTimer:
    """Seconds per phase of a step.

        with timer.phase("generate"):
            ...
        log(timer.pop())  # {"seconds/generate": 1.2}

    A phase may be entered several times before `pop`; the seconds add up. A phase that ends with
    an exception counts too. Phases inside one another each count in full.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def seconds(self, name: str) -> float:
        """Seconds of this phase since the last `pop`; 0 if it was not entered."""
        return self._seconds.get(name, 0.0)

    def pop(self) -> dict[str, float]:
        """The seconds by phase since the last call; counting starts again at 0."""
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}
