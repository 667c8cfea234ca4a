"""What every training run does around its steps: evaluations, checkpoints, the end. Its steps are a subclass's."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.common.errors import RunError
from real_openrlhf.controller.dynamic_sampling import CannotFill
from real_openrlhf.controller.guards import Alarm, Guards, WentWrong
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.progress import PhaseTimer
from real_openrlhf.controller.protocols import Evaluator, PolicyGroup, WeightSync
from real_openrlhf.controller.records import Log, Progress, Saver
from real_openrlhf.data.stream import StreamExhausted

logger = logging.getLogger(__name__)

# Why an update was skipped (actors.policy.trainer.Update) -> in words.
_NOT_FINITE = {
    "rollouts": "log-probs of engine or reference, or rewards, are",
    "loss": "the loss is",
    "gradients": "gradients are",
}


class Stopped(Exception):
    """A signal asked the run to stop, and a save was tried. saved: it succeeded."""

    def __init__(self, step: int, signal: str, saved: bool) -> None:
        super().__init__(f"{signal}: stopped after step {step}")
        self.step = step
        self.saved = saved


class NotFinite(RunError):
    """Too many steps in a row whose update was skipped, since a number was NaN or infinite."""


class TrainingLoop(ABC):
    """A loop over steps, with what comes between them.

    total_steps  0 evaluates and exports only
    weight_sync, evaluator   None: nothing is judged while training
    guards       watches over evaluations, and over steps where the subclass asks them; None: none
    max_skipped  stop after so many skipped steps in a row; 0: never
    """

    def __init__(
        self,
        *,
        total_steps: int,
        eval_steps: int,
        eval_beside: bool,
        policy: PolicyGroup,
        weight_sync: WeightSync | None,
        evaluator: Evaluator | None,
        guards: Guards | None,
        export: JudgeExport,
        log: Log,
        progress: Progress,
        stop_requested: Callable[[], str | None],
        max_skipped: int = 0,
    ) -> None:
        self.total_steps = total_steps
        self.eval_steps = eval_steps
        self.eval_beside = eval_beside
        self.policy = policy
        self.weight_sync = weight_sync
        self.evaluator = evaluator
        self.guards = guards
        self.export = export
        self.log = log
        self.progress = progress
        self.stop_requested = stop_requested
        self.max_skipped = max_skipped
        # Steps with a skipped update, in a row.
        self.skipped_steps = 0
        self._saver: Saver | None = None
        self.timer = PhaseTimer()
        self.step_number = 0
        self.last_eval: dict[str, float | None] = {}
        self._evaluated_at = -1
        # Step of an evaluation that is under way.
        self._evaluating: int | None = None
        self._resumed = False
        self._wrong: Alarm | None = None

    @abstractmethod
    def step(self) -> None:
        """One step. It counts `step_number` up, logs, evaluates when it is due, and saves last."""

    @abstractmethod
    def checkpointed_parts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the policy's shards: objects with state_dict and load_state_dict, by name."""

    def fit(self, saver: Saver | None = None) -> dict[str, float | None]:
        """The whole run; returns the metrics of the last evaluation. saver: None writes no checkpoints.

        The end of the prompts ends training, unless it comes before a single step: CannotFill.
        """
        self._saver = saver
        synced = self._sync()
        if not self._resumed:
            # A resumed run does neither: its records are those of a run that was never interrupted.
            if synced:
                self.log.log(self.step_number, "sync", {**synced, **self.timer.pop()})
            self._evaluate()
        self.timer.pop()
        while self.step_number < self.total_steps and not self._enough():
            try:
                self.step()
            except StreamExhausted as error:
                if self.step_number == 0:
                    raise CannotFill(
                        f"dynamic sampling used up all prompts before the first batch was full: {error}. Train on "
                        "more groups (--real.keep_groups), do without refill (--no-real.refill), or lower "
                        "--rollout.batch_size."
                    ) from error
                logger.info("the prompts of all episodes are used up after %d steps", self.step_number)
                break
        self._evaluate()
        self._finish_evaluation()
        self.export.finish(self.step_number, self.last_eval)
        return self.last_eval

    def _enough(self) -> bool:
        """Whether training ends before its last step."""
        return False

    def _save(self) -> None:
        signal, saver, step = self.stop_requested(), self._saver, self.step_number
        if signal is not None or (saver is not None and (saver.uses_evaluations or saver.is_due(step, None))):
            # Its result may make this checkpoint the best, and a checkpoint cannot hold a running evaluation.
            self._finish_evaluation()
        evaluation = self.last_eval if self._evaluated_at == step and self._evaluating is None else None
        saved = False
        if saver is not None and (signal is not None or saver.is_due(step, evaluation)):
            saved = saver.save(step, evaluation)
            self.log.page()
        if signal is not None:
            raise Stopped(self.step_number, signal, saved)

    def _heed(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.log.warn(self.step_number, alarm.watch, alarm.message)
            if alarm.stops:
                self._wrong = self._wrong or alarm

    def _stop(self, alarm: Alarm) -> NoReturn:
        raise WentWrong(
            f"stopped after step {self.step_number}: {alarm.message} The best judge so far is kept where evaluations "
            "chose one, and checkpoints stay. --guard.stop names the watches that may stop a run; with none it goes on "
            "whatever they see."
        )

    def _heed_skipped(self, trained: Mapping[str, float], groups: Sequence[TrainGroup]) -> None:
        """After an update: warn where it was skipped, keep its batch, and stop when that happens again and again."""
        reasons = [name.removeprefix("skipped/") for name, n in trained.items() if name.startswith("skipped/") and n]
        self.skipped_steps = self.skipped_steps + 1 if reasons else 0
        if not reasons:
            return
        what = " and ".join(_NOT_FINITE[reason] for reason in reasons)
        kept = self.log.keep_batch(self.step_number, groups, trained)
        message = f"{what} NaN or infinite: the update was skipped, the weights are as before; {kept}."
        self.log.warn(self.step_number, "finite", message)
        if self.max_skipped and self.skipped_steps >= self.max_skipped:
            raise NotFinite(
                f"step {self.step_number}: {message} That is the case for {self.skipped_steps} steps in a row "
                "(--real.max_skipped). If the weights themselves have grown too large, lower --actor.adam.lr, raise "
                "--actor.lr_warmup_ratio, and resume from an earlier checkpoint (--ckpt.load best, or a path)."
            )

    def _end_step(self) -> None:
        """Evaluation, checkpoint, and the end of the run if a signal or a watch asked for it."""
        if self.eval_steps > 0 and self.step_number % self.eval_steps == 0:
            self._evaluate()
        self._save()
        if self._wrong is not None:
            self._stop(self._wrong)

    def _sync(self) -> dict[str, float]:
        """Bring the policy's weights to the engines; metrics of the transfer, none without engines."""
        if self.weight_sync is None:
            return {}
        # Weights must not change under an evaluation.
        self._finish_evaluation()
        with self.timer.phase("sync"):
            report = self.weight_sync.sync(self.step_number)
        moved = {} if report.moved is None else {"sync/policy_moved": report.moved}
        return {
            **moved,
            "sync/logprob_mean": report.mean_difference,
            "sync/logprob_max": report.max_difference,
            "sync/transfer_seconds": report.seconds,
            "sync/check_seconds": report.check_seconds,
        }

    def _evaluate(self) -> None:
        if self.evaluator is None or self._evaluated_at == self.step_number:
            return
        with self.timer.phase("evaluate"):
            self.evaluator.start(self.step_number)
        self._evaluated_at = self._evaluating = self.step_number
        if not self.eval_beside:
            self._finish_evaluation()
            # Not part of the next step.
            self.timer.pop()

    def _finish_evaluation(self) -> None:
        """Wait for the evaluation that is under way, if any, and log it at the step that it began at."""
        if self.evaluator is None or self._evaluating is None:
            return
        with self.timer.phase("evaluate"):
            step = self._evaluating
            report = self.evaluator.result(lambda done, total: self.progress.judged(step, done, total))
        self._evaluating = None
        self.last_eval = report.metrics
        metrics: dict[str, Any] = {f"eval/{name}": value for name, value in report.metrics.items()}
        for name, change in report.changes.items():
            metrics |= {
                f"eval/change/{name}": change.difference,
                f"eval/change/{name}_low": change.low,
                f"eval/change/{name}_high": change.high,
            }
        metrics["weight_version"] = report.version
        metrics["seconds/evaluate"] = report.seconds
        self.log.log(step, "eval", metrics)
        self.log.log_evaluation(step, report.samples, report.plots)
        self.progress.evaluated(step, report.metrics)
        self.export.evaluated(step, report.metrics)
        if self.guards is not None:
            self._heed(self.guards.evaluation(report.metrics, report.changes))
        self.log.page()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "step_number": self.step_number,
            "last_eval": dict(self.last_eval),
            "evaluated_at": self._evaluated_at,
            "skipped_steps": self.skipped_steps,
            "export": self.export.state_dict(),
        }
        if self.guards is not None:
            state["guards"] = self.guards.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_number = state["step_number"]
        self.last_eval = dict(state["last_eval"])
        self._evaluated_at = state["evaluated_at"]
        # Not in checkpoints of earlier versions.
        self.skipped_steps = state.get("skipped_steps", 0)
        for name, part in (("guards", self.guards), ("export", self.export)):
            if part is not None and name in state:
                part.load_state_dict(state[name])
        self._resumed = True
