"""Protocols: what the controller needs of its log, its progress bar and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from real_openrlhf.algo.types import TrainGroup

Phase = Literal["train", "eval", "sync"]


class Log(Protocol):
    def log(self, step: int, phase: Phase, metrics: Mapping[str, Any]) -> None: ...

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def log_evaluation(self, step: int, samples: Sequence[Mapping[str, Any]], plots: Mapping[str, str]) -> None: ...

    def page(self, *, last: bool = False) -> None:
        """Write the run's page (`controller.report`). last: the run ends; else it may be left out, to save time."""
        ...

    def warn(self, step: int, watch: str, message: str) -> None: ...

    def keep_batch(self, step: int, groups: Sequence[TrainGroup], metrics: Mapping[str, Any]) -> str:
        """Keep a batch for study; returns in words where it is, or why it is not kept."""
        ...


class Saver(Protocol):
    """Writes checkpoints; see `controller.checkpointing.Checkpointer`.

    uses_evaluations: evaluations decide which checkpoints are saved.
    """

    @property
    def uses_evaluations(self) -> bool: ...

    def is_due(self, step: int, evaluation: dict[str, float | None] | None) -> bool: ...

    def save(self, step: int, evaluation: dict[str, float | None] | None = None) -> bool: ...


class Progress(Protocol):
    def step(self, step: int, metrics: Mapping[str, float | None]) -> None: ...

    def judged(self, step: int, done: int, total: int) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None: ...
