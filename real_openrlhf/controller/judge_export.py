"""Which weights become the exported judge: those of the best evaluation, else the last.

A new best is exported at once, since the next update changes the policy's weights. It is written to `best_step_<n>`,
next to the judge's folder, and takes that folder's place at the end. If the run dies, the best judge is still there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from real_openrlhf.common.atomic_folder import replace_folder
from real_openrlhf.common.errors import FolderError
from real_openrlhf.controller.checkpointing import LOWER_IS_BETTER

logger = logging.getLogger(__name__)

BEST = "best_step_"


class Exporter(Protocol):
    def save_model(self, path: str, complete: Callable[[Path], None]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The weights of an export.

    step        number of the training step after which the policy had them
    why         why these were chosen, in words, for the model card
    evaluation  metrics of these weights; empty if they were not evaluated
    """

    step: int
    why: str
    evaluation: Mapping[str, float | None]


class JudgeExport:
    """
    folder    where the exported judge is written
    metric    evaluation metric that decides which weights are best ("expected/pearson"); None: the last are exported
    describe  adds model card and judge settings to an exported folder, and checks it
    step_of   the step that an exported folder's settings name; None where they name none
    """

    def __init__(
        self,
        policy: Exporter,
        folder: str | Path,
        *,
        metric: str | None,
        describe: Callable[[Path, Chosen], None] = lambda folder, chosen: None,
        step_of: Callable[[Path], int | None] = lambda folder: None,
    ) -> None:
        self.policy = policy
        self.folder = Path(folder)
        self.metric = metric
        self.describe = describe
        self.step_of = step_of
        self.chosen = Chosen(step=0, why="not trained", evaluation={})
        self._best: Chosen | None = None
        self._evaluations = 0
        # Evaluations in a row that were not better than the best.
        self.since_best = 0

    def evaluated(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Export the policy's weights if they are the best so far. Call while it still has the weights evaluated."""
        value = None if self.metric is None else metrics.get(self.metric)
        if self.metric is None or value is None:
            return
        self._evaluations += 1
        if self._best is not None and not self._is_better(value, self._value(self._best)):
            self.since_best += 1
            return
        self.since_best = 0
        self.chosen = Chosen(step=step, why=self._why(step, value, None), evaluation=dict(metrics))
        try:
            self._write(self._best_folder(step))
        except (OSError, FolderError) as error:
            # A failed export does not end the run; the next better evaluation tries again.
            logger.error("the judge of step %d, the best so far, could not be exported: %s", step, error)
            return
        self._best = self.chosen
        self._remove_all_but(self._best_folder(step))

    def finish(self, step: int, evaluation: Mapping[str, float | None]) -> None:
        """Put the judge into its folder. step, evaluation: the last ones of the run."""
        best = self._best
        if best is None:
            why = "the last ones" if self.metric is None else f"the last ones: no evaluation has {self.metric}"
            self.chosen = Chosen(step=step, why=f"{why}, of step {step}", evaluation=dict(evaluation))
            self._write(self.folder)
            self._remove_all_but(None)
            return
        self.chosen = Chosen(
            step=best.step, why=self._why(best.step, self._value(best), step), evaluation=best.evaluation
        )
        logger.info("the judge has the weights of %s", self.chosen.why)
        folder = self._best_folder(best.step)
        self.describe(folder, self.chosen)
        replace_folder(folder, self.folder)
        self._best = None

    def _write(self, folder: Path) -> None:
        self.policy.save_model(str(folder), lambda new: self.describe(new, self.chosen))

    def _remove_all_but(self, kept: Path | None) -> None:
        """Remove exports of earlier bests, also those left by an earlier run that died before its first checkpoint."""
        for left in self.folder.parent.glob(f"{BEST}*"):
            if left != kept:
                shutil.rmtree(left, ignore_errors=True)

    def _why(self, step: int, value: float, last: int | None) -> str:
        what = f"step {step}, the best of {self._evaluations} evaluations by {self.metric} ({value:.4f})"
        return what if last is None or last == step else f"{what}; training went on to step {last}"

    def _value(self, chosen: Chosen) -> float:
        assert self.metric is not None
        value = chosen.evaluation[self.metric]
        assert value is not None
        return value

    def _is_better(self, value: float, best: float) -> bool:
        assert self.metric is not None
        return value < best if self.metric.endswith(LOWER_IS_BETTER) else value > best

    def _best_folder(self, step: int) -> Path:
        return self.folder.with_name(f"{BEST}{step}")

    def state_dict(self) -> dict[str, Any]:
        best = self._best
        return {
            "metric": self.metric,
            "evaluations": self._evaluations,
            "since_best": self.since_best,
            "best": None if best is None else {"step": best.step, "evaluation": dict(best.evaluation)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best so far. Exports of steps after the checkpoint are removed: those steps are made again."""
        same = state["metric"] == self.metric
        best = state["best"] if same else None
        self._remove_all_but(None if best is None else self._best_folder(best["step"]))
        self._evaluations = state["evaluations"] if same else 0
        self.since_best = state.get("since_best", 0) if same else 0  # not in checkpoints of earlier versions
        if best is None:
            return
        if not self._best_folder(best["step"]).is_dir() and self.step_of(self.folder) == best["step"]:
            # The run had already finished and is now continued with more steps.
            shutil.copytree(self.folder, self._best_folder(best["step"]))
        if not self._best_folder(best["step"]).is_dir():
            logger.warning(
                "the best judge so far, of step %d, is no longer in %s: the next evaluation counts as the best",
                best["step"],
                self._best_folder(best["step"]),
            )
            return
        self._best = Chosen(step=best["step"], why="", evaluation=best["evaluation"])
