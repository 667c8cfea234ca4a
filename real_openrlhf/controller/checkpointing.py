"""What a checkpoint of a run holds, and when one is written. How it is written: `real_openrlhf.checkpoint`.

policy/           DeepSpeed's shards of weights, optimizer and schedule, and every rank's RNG
controller.json   step, guards, last evaluation
prompts.json      position in the prompt stream, data hash, prompts put back by dynamic sampling
evaluator.json    the first evaluation, with which later ones are compared
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from real_openrlhf.checkpoint.compat import RunIdentity, check
from real_openrlhf.checkpoint.errors import CheckpointWriteError
from real_openrlhf.checkpoint.manifest import Checkpoint, CheckpointMeta
from real_openrlhf.checkpoint.store import CheckpointStore

logger = logging.getLogger(__name__)

LOWER_IS_BETTER = ("rmse", "mae", "ece", "_rate")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PolicyShards(Protocol):
    def save_checkpoint(self, path: str) -> None: ...

    def load_checkpoint(self, path: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """
    every    save every so many steps; -1: only when asked to stop, and for a new best
    metric   name of the evaluation metric that decides the best ("expected/pearson"); None: no best
    parts    what is saved as <name>.json besides the policy
    """

    store: CheckpointStore
    identity: RunIdentity
    policy: PolicyShards
    parts: dict[str, Stateful]
    every: int
    metric: str | None

    @property
    def uses_evaluations(self) -> bool:
        """Checkpoints are saved, and one of them is the best by an evaluation."""
        return self.every > 0 and self.metric is not None

    def is_due(self, step: int, evaluation: dict[str, float | None] | None) -> bool:
        """evaluation: this step's metrics; None if it had no evaluation. A new best is saved whatever the step."""
        if self.every > 0 and step % self.every == 0:
            return True
        value = self._value(evaluation)
        if value is None or self.every <= 0:
            return False
        best = self.store.best()
        if best is None or best.metric is None:
            return True
        return value > best.metric if self.store.higher_is_better else value < best.metric

    def save(self, step: int, evaluation: dict[str, float | None] | None = None) -> bool:
        """False, with an error in the log, if it could not be written: the run goes on, earlier ones are untouched."""
        try:
            with self.store.begin(step, CheckpointMeta(identity=self.identity, weight_version=step)) as writer:
                self.policy.save_checkpoint(str(writer.path / "policy"))
                for name, part in self.parts.items():
                    writer.write_json(f"{name}.json", part.state_dict())
                checkpoint = writer.commit(self._value(evaluation))
        except CheckpointWriteError:
            return False
        logger.info("saved %s", checkpoint.path)
        return True

    def load(self, checkpoint: Checkpoint) -> int:
        """Restore every part to its state in the checkpoint; returns the checkpoint's step."""
        # An absolute path, since actors have another working folder.
        self.policy.load_checkpoint(str(checkpoint.path.resolve() / "policy"))
        for name, part in self.parts.items():
            part.load_state_dict(checkpoint.read_json(f"{name}.json"))
        logger.info("resumed from %s", checkpoint.path)
        return checkpoint.step

    def _value(self, evaluation: dict[str, float | None] | None) -> float | None:
        return None if evaluation is None or self.metric is None else evaluation.get(self.metric)


def find_checkpoint(
    root: str | Path, which: str, identity: RunIdentity, *, metric: str | None, force: bool
) -> Checkpoint | None:
    """The checkpoint to resume from, checked against this run. None for "none", and for "auto" without any.

    which: "none", "auto", "latest", "best" or a path. Raises CheckpointError, before anything starts,
    for one that is missing, incomplete, corrupt or of another run.
    """
    if which == "none":
        return None
    store = make_store(root, keep=1, metric=metric)
    if which == "auto":
        complete = store.complete()
        if not complete:
            return None
        which = "latest"
    checkpoint = store.find(which if which in ("latest", "best") else Path(which))
    check(checkpoint.meta.identity, identity, force=force)
    return checkpoint


def make_store(root: str | Path, *, keep: int, metric: str | None) -> CheckpointStore:
    return CheckpointStore(
        root,
        keep=keep,
        keep_best=metric is not None,
        metric_name=metric or "none",
        higher_is_better=metric is None or not metric.endswith(LOWER_IS_BETTER),
    )
