"""The controller: a loop over rollouts, advantages, updates, weight sync and evaluation.

    prompts ──► rollout engines ──► groups ──► objective ──► coefficients ──► policy ranks
                     ▲                                                            │
                     └──────────── weights, version n, agreement check ◄──────────┘
                     │
                     └──► evaluator ──► metrics

A group is one prompt with its rollouts. The objective turns a group's rewards into coefficients: the weights of each
rollout's loss terms (`algo.types.Coefficients`).
With a KL, the reference ranks add their log-probs to the groups before the policy trains on them.
With `one_ahead`, engines sample the next batch while the policy trains on this one (controller/batches.py).
The controller knows the actors only as Protocols (controller/protocols.py), so tests run it with fakes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from real_openrlhf.algo.objectives.base import Objective
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, TrainGroup, group_scores
from real_openrlhf.common.errors import RunError
from real_openrlhf.controller.batches import Batch, BatchSource, PromptStore
from real_openrlhf.controller.dynamic_sampling import CannotFill, Collected, collect
from real_openrlhf.controller.first_look import check_first_rollouts
from real_openrlhf.controller.guards import Alarm, Guards, WentWrong
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.progress import PhaseTimer, process_seconds
from real_openrlhf.controller.protocols import (
    Evaluator,
    PolicyGroup,
    ReferenceGroup,
    RolloutGroup,
    WeightSync,
)
from real_openrlhf.controller.records import Log, Progress, Saver
from real_openrlhf.controller.rollout_stats import judgement_samples, rollout_metrics
from real_openrlhf.controller.settings import ControllerSettings
from real_openrlhf.controller.step_metrics import sampled_reward, sampling_metrics, speed_metrics
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import StreamExhausted

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved. saved: the save succeeded."""

    def __init__(self, step: int, signal: str, saved: bool) -> None:
        super().__init__(f"{signal}: stopped after step {step}")
        self.step = step
        self.saved = saved


class NothingLearned(RunError):
    """Too many steps in a row in which every advantage was zero."""


class Controller:
    def __init__(
        self,
        settings: ControllerSettings,
        *,
        scale: ScoreScale,
        objective: Objective,
        prompts: PromptStore,
        rollouts: RolloutGroup,
        policy: PolicyGroup,
        weight_sync: WeightSync,
        evaluator: Evaluator | None,
        reference: ReferenceGroup | None = None,
        guards: Guards,
        export: JudgeExport,
        log: Log,
        progress: Progress,
        decode: Callable[[list[int]], str] | None = None,
        stop_requested: Callable[[], str | None] = lambda: None,
        since_command: Callable[[], float] = process_seconds,
    ) -> None:
        self.settings = settings
        self.scale = scale
        self.objective = objective
        self.prompts = prompts
        self.batches = BatchSource(prompts, self._collect)
        self.rollouts = rollouts
        self.policy = policy
        self.weight_sync = weight_sync
        self.evaluator = evaluator
        self.reference = reference
        self.guards = guards
        self.export = export
        self.log = log
        self.progress = progress
        self.decode = decode
        self.stop_requested = stop_requested
        self.since_command = since_command
        # Metrics that are logged once, with the first step that this process logs. None until the first update.
        self._once: dict[str, float] | None = None
        self._saver: Saver | None = None
        self.timer = PhaseTimer()
        self.step_number = 0
        self.dead_steps = 0
        self.last_eval: dict[str, float | None] = {}
        self._evaluated_at = -1
        # Step of the evaluation that is running now; None when there is none.
        self._evaluating: int | None = None
        self._resumed = False
        self._wrong: Alarm | None = None

    def checkpointed_parts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the policy's shards: objects with state_dict and load_state_dict, by name."""
        parts: dict[str, Any] = {"controller": self, "prompts": self.batches}
        if self.evaluator is not None:
            parts["evaluator"] = self.evaluator
        return parts

    def fit(self, saver: Saver | None = None) -> dict[str, float | None]:
        """The whole run; returns the metrics of the last evaluation. saver: None writes no checkpoints.

        Training also ends when the prompts are used up. If that happens before the first step, CannotFill is raised.
        """
        self._saver = saver
        synced = self._sync()
        if not self._resumed:
            # A resumed run skips both: an unbroken run has neither of them at a later step.
            self.log.log(self.step_number, "sync", {**synced, **self.timer.pop()})
            self._evaluate()
        self.timer.pop()
        while self.step_number < self.settings.total_steps:
            try:
                self.step()
            except StreamExhausted as error:
                if self.step_number == 0:
                    raise CannotFill(
                        f"dynamic sampling used up all prompts before the first batch was full: {error}. Train on "
                        "more groups (--real.keep_groups), switch refill off (--no-real.refill), or lower "
                        "--rollout.batch_size."
                    ) from error
                logger.info("the prompts of all episodes are used up after %d steps", self.step_number)
                break
        self._evaluate()
        self._finish_evaluation()
        self.export.finish(self.step_number, self.last_eval)
        return self.last_eval

    def step(self) -> None:
        """One step, from prompts to a new version of the weights."""
        # 1. Rollouts, filtered by accuracy. The newest weights sample them; one step ahead, the weights before those.
        with self.timer.phase("generate"):
            batch = self.batches.take(self.step_number, self.step_number)
            self.rollouts.sleep()
        age, collected = self._age(batch), batch.collected
        # 2. Rewards and advantages, from the score distributions that came with the rollouts.
        with self.timer.phase("advantages"):
            groups = [self._train_group(group) for group in collected.kept]
            stats = rollout_metrics(collected.sampled, groups, self.scale, renormalise=self.settings.renormalise)
            stats["reward/sampled_mean"] = sampled_reward(collected, groups, self._train_group)
        # 3. Log-probs of the reference policy, for the KL.
        if self.reference is not None:
            with self.timer.phase("reference"):
                found = self.reference.reference_logprobs(groups)
            groups = [replace(group, ref_logprobs=logprobs) for group, logprobs in zip(groups, found, strict=True)]
        # 4. Policy updates. One step ahead, the engines sample the next batch at the same time.
        if self.settings.one_ahead and self.step_number + 1 < self.settings.total_steps:
            self.batches.start(self.step_number + 1, self.step_number)
        if self.export.metric is not None:
            # It may find that these weights are the best so far: they must be exported before training changes them.
            self._finish_evaluation()
        with self.timer.phase("train"):
            trained = self.policy.train(groups)
        if self._once is None:
            self._once = {"seconds/first_step": self.since_command()}
        with self.timer.phase("generate"):
            self.batches.wait()
        self.step_number += 1
        # 5. The engines get the new weights, and their log-probs are compared with the policy's.
        synced = self._sync()
        # 6. Logs.
        metrics = {**stats, **trained, **sampling_metrics(collected), **synced, "rollouts/age": age}
        metrics.update(speed_metrics(self.timer.pop(), batch))
        self._log_step(metrics, collected, groups)
        self._stop_if_nothing_is_learned(groups)
        self._report(self.guards.step(metrics))
        # 7. Evaluation.
        every = self.settings.eval_steps
        if every > 0 and self.step_number % every == 0:
            self._evaluate()
        # 8. Checkpoint, and the end of the run if a signal or a watch asked for it.
        self._save()
        if self._wrong is not None:
            self._stop(self._wrong)

    def _save(self) -> None:
        signal, saver, step = self.stop_requested(), self._saver, self.step_number
        if signal is not None or (saver is not None and (saver.uses_evaluations or saver.is_due(step, None))):
            # It may make this step the best one, and a checkpoint cannot hold an evaluation that is still running.
            self._finish_evaluation()
        evaluation = self.last_eval if self._evaluated_at == step and self._evaluating is None else None
        saved = False
        if saver is not None and (signal is not None or saver.is_due(step, evaluation)):
            saved = saver.save(step, evaluation)
        if signal is not None:
            raise Stopped(self.step_number, signal, saved)

    def _report(self, alarms: Sequence[Alarm]) -> None:
        """Log what the guards saw; the first alarm that stops the run is remembered until the step is complete."""
        for alarm in alarms:
            self.log.warn(self.step_number, alarm.watch, alarm.message)
            if alarm.stops:
                self._wrong = self._wrong or alarm

    def _stop(self, alarm: Alarm) -> NoReturn:
        raise WentWrong(
            f"stopped after step {self.step_number}: {alarm.message} The best judge so far is kept where evaluations "
            "chose one, and checkpoints are kept. --guard.stop says which watches may stop a run; none lets it go on."
        )

    def _age(self, batch: Batch) -> float:
        """How many versions the rollouts' weights are behind the policy's: 0, or 1 with `one_ahead`."""
        age = self.step_number - batch.version
        if not 0 <= age <= (1 if self.settings.one_ahead else 0):
            raise RuntimeError(f"step {self.step_number} got rollouts of weight version {batch.version}")
        return float(age)

    def _collect(self, step: int, version: int) -> Collected:
        """The groups that `step` trains on, sampled by this version of the weights."""
        s = self.settings
        wave = 0

        def generate(prompts: Sequence[Prompt]) -> list[Group]:
            nonlocal wave
            seed = (s.seed * 1_000_003 + step) * 101 + wave if s.seeded else None
            wave += 1
            sampling = Sampling(
                n=s.sampling.n,
                temperature=s.sampling.temperature,
                top_p=s.sampling.top_p,
                max_new_tokens=s.sampling.max_new_tokens,
                seed=seed,
            )
            groups = self.rollouts.generate(prompts, sampling)
            other = {group.weight_version for group in groups} - {version}
            if other:
                raise RuntimeError(
                    f"rollouts of step {step} come from weight versions {sorted(other)}, expected {version}"
                )
            if step == 0 and wave == 1:
                # Before the filter: else a judge that writes no scores fails with "no group was kept", not the cause.
                self._first_look(groups)
            return groups

        return collect(
            self.prompts,
            generate,
            self.scale,
            batch_size=s.batch_size,
            multiple_of=s.share_by,
            keep=s.keep,
            refill=s.refill,
            max_refills=s.max_refills,
        )

    def _train_group(self, group: Group) -> TrainGroup:
        target = self.scale.target(group.label)
        coefficients = self.objective(group_scores(group, self.scale.tensor(), target))
        return TrainGroup(group=group, target=target, coefficients=coefficients)

    def _first_look(self, groups: Sequence[Group]) -> None:
        report = check_first_rollouts(
            groups,
            self.scale,
            min_mass=self.settings.min_mass,
            min_readable=self.settings.min_readable,
            top_p=self.settings.sampling.top_p,
            renormalise=self.settings.renormalise,
        )
        logger.info("%s", report)

    def _sync(self) -> dict[str, float]:
        # Weights must not change under an evaluation.
        self._finish_evaluation()
        with self.timer.phase("sync"):
            report = self.weight_sync.sync(self.step_number)
        return {
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
        if not self.settings.eval_beside:
            self._finish_evaluation()
            # These seconds are not part of the next step's.
            self.timer.pop()

    def _finish_evaluation(self) -> None:
        """Wait for the running evaluation, if there is one, and log it at the step at which it began."""
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
        self._report(self.guards.evaluation(report.metrics, report.changes))

    def _log_step(self, metrics: dict[str, Any], collected: Collected, groups: Sequence[TrainGroup]) -> None:
        if self.step_number % self.settings.logging_steps == 0:
            self.log.log(self.step_number, "train", {**metrics, **(self._once or {})})
            self._once = {}
            samples = judgement_samples(
                collected.kept,
                groups,
                self.settings.n_samples,
                self.scale,
                decode=self.decode,
                renormalise=self.settings.renormalise,
            )
            self.log.log_samples(self.step_number, samples)
        self.progress.step(self.step_number, metrics)

    def _stop_if_nothing_is_learned(self, groups: Sequence[TrainGroup]) -> None:
        dead = all(group.coefficients.zero_variance for group in groups)
        self.dead_steps = self.dead_steps + 1 if dead else 0
        if self.settings.dead_steps and self.dead_steps >= self.settings.dead_steps:
            raise NothingLearned(
                f"{self.dead_steps} steps in a row had no group whose rewards differ: Term 1 learns nothing. Raise "
                "--rollout.temperature, sample more rollouts per prompt, or look at the judgements in samples.jsonl "
                "(--real.dead_steps sets this limit, 0 switches it off)."
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "step_number": self.step_number,
            "dead_steps": self.dead_steps,
            "last_eval": dict(self.last_eval),
            "evaluated_at": self._evaluated_at,
            "guards": self.guards.state_dict(),
            "export": self.export.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_number = state["step_number"]
        self.dead_steps = state["dead_steps"]
        self.last_eval = dict(state["last_eval"])
        self._evaluated_at = state["evaluated_at"]
        # Checkpoints of earlier versions do not have them.
        for name, part in (("guards", self.guards), ("export", self.export)):
            if name in state:
                part.load_state_dict(state[name])
        self._resumed = True
