"""The warm-up's loop: given judgements, updates, evaluations. No rollouts, no rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.controller.batches import PromptStore
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.loop import TrainingLoop
from real_openrlhf.controller.protocols import Evaluator, PolicyGroup, RolloutGroup, WeightSync
from real_openrlhf.controller.records import Log, Progress
from real_openrlhf.data.prompt import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WarmupSettings:
    """
    total_steps    updates of the run; 0 evaluates and exports only
    batch_size     rows per update
    eval_steps     evaluate every n steps; -1: only before and after
    eval_beside    engines have GPUs of their own: go on while they judge, until the next weight sync
    max_skipped    stop after n steps in a row whose update was skipped; 0: never
    logging_steps  log every n steps: losses of that step alone, seconds and speed since the row before
    patience       stop after n evaluations in a row without a better judge; None: never
    """

    total_steps: int
    batch_size: int
    eval_steps: int
    eval_beside: bool
    logging_steps: int
    max_skipped: int = 0
    patience: int | None = None


class WarmupController(TrainingLoop):
    """Engines are there for evaluations alone, and get the weights before each of them.

    group_of  a prompt of the data -> its given response with the objective's coefficients
    engines, weight_sync, evaluator   None: nothing is judged
    """

    def __init__(
        self,
        settings: WarmupSettings,
        *,
        prompts: PromptStore,
        group_of: Callable[[Prompt], TrainGroup],
        policy: PolicyGroup,
        engines: RolloutGroup | None,
        weight_sync: WeightSync | None,
        evaluator: Evaluator | None,
        export: JudgeExport,
        log: Log,
        progress: Progress,
        stop_requested: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__(
            total_steps=settings.total_steps,
            eval_steps=settings.eval_steps,
            eval_beside=settings.eval_beside,
            policy=policy,
            weight_sync=weight_sync,
            evaluator=evaluator,
            guards=None,
            export=export,
            log=log,
            progress=progress,
            stop_requested=stop_requested,
            max_skipped=settings.max_skipped,
        )
        self.settings = settings
        self.prompts = prompts
        self.group_of = group_of
        self.engines = engines
        self._synced_at = -1
        # Since the last row of the log.
        self._tokens = 0

    def checkpointed_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"controller": self, "prompts": self.prompts}
        if self.evaluator is not None:
            parts["evaluator"] = self.evaluator
        return parts

    def step(self) -> None:
        """One update on the next rows."""
        with self.timer.phase("data"):
            groups = [self.group_of(prompt) for prompt in self.prompts.take(self.settings.batch_size)]
        if self.export.metric is not None:
            # Training changes the weights that an evaluation beside it may find to be the best.
            self._finish_evaluation()
        with self.timer.phase("train"):
            trained = _named(self.policy.train(groups))
        self.step_number += 1
        self._tokens += sum(g.group.prompt_ids.numel() + r.token_ids.numel() for g in groups for r in g.group.rollouts)
        if self.step_number % self.settings.logging_steps == 0:
            metrics = {**trained, **_speed(self.timer.pop(), self._tokens)}
            self._tokens = 0
            self.log.log(self.step_number, "train", metrics)
            self.progress.step(self.step_number, metrics)
        self._heed_skipped(trained, groups)
        self._end_step()

    def _enough(self) -> bool:
        patience, since = self.settings.patience, self.export.since_best
        if patience is None or since < patience:
            return False
        logger.info("stopped after step %d: no better judge in %d evaluations", self.step_number, since)
        return True

    def _sync(self) -> dict[str, float]:
        synced = super()._sync()
        self._synced_at = self.step_number
        return synced

    def _evaluate(self) -> None:
        due = self.evaluator is not None and self._evaluated_at != self.step_number
        if due and self._synced_at != self.step_number:
            self.log.log(self.step_number, "sync", self._sync())
        super()._evaluate()
        if due and not self.eval_beside and self.engines is not None:
            self.engines.sleep()


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The policy's metrics by what they are here: Term 1 on given text is its cross-entropy.

    Without what given responses do not have: another likelihood of the score, and a ratio to their sampler.
    """
    absent = ("loss/likelihood", "logit_grad_norm/likelihood", "policy/clipped_share")
    new = {"loss/cot": "loss/cross_entropy", "logit_grad_norm/cot": "logit_grad_norm/cross_entropy"}
    return {new.get(name, name): value for name, value in metrics.items() if name not in absent}


def _speed(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    return {**seconds, "speed/trained_tokens_per_second": tokens / max(seconds["seconds/train"], 1e-9)}
