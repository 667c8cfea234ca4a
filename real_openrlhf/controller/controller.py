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
from typing import Any

from real_openrlhf.algo.objectives.base import Objective
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group, TrainGroup, group_scores
from real_openrlhf.common.errors import RunError
from real_openrlhf.controller.batches import Batch, BatchSource, PromptStore
from real_openrlhf.controller.dynamic_sampling import Collected, collect
from real_openrlhf.controller.first_look import check_first_rollouts
from real_openrlhf.controller.guards import Guards
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.loop import TrainingLoop
from real_openrlhf.controller.progress import process_seconds
from real_openrlhf.controller.protocols import (
    Evaluator,
    PolicyGroup,
    ReferenceGroup,
    RolloutGroup,
    WeightSync,
)
from real_openrlhf.controller.records import Log, Progress
from real_openrlhf.controller.rollout_stats import judgement_samples, rollout_metrics
from real_openrlhf.controller.settings import ControllerSettings
from real_openrlhf.controller.step_metrics import sampled_reward, sampling_metrics, speed_metrics
from real_openrlhf.data.prompt import Prompt

logger = logging.getLogger(__name__)


class NothingLearned(RunError):
    """Too many steps in a row in which every advantage was zero."""


class Controller(TrainingLoop):
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
        judged: Callable[[int], Sequence[int] | None] = lambda row: None,
        stop_requested: Callable[[], str | None] = lambda: None,
        since_command: Callable[[], float] = process_seconds,
    ) -> None:
        super().__init__(
            total_steps=settings.total_steps,
            eval_steps=settings.eval_steps,
            eval_beside=settings.eval_beside,
            policy=policy,
            weight_sync=weight_sync,
            evaluator=evaluator,
            guards=guards,
            export=export,
            log=log,
            progress=progress,
            stop_requested=stop_requested,
            max_skipped=settings.max_skipped,
        )
        self.settings = settings
        self.scale = scale
        self.objective = objective
        self.prompts = prompts
        self.batches = BatchSource(prompts, self._collect)
        self.rollouts = rollouts
        self.watches: Guards = guards
        self.reference = reference
        self.decode = decode
        # Row of a prompt -> the tokens of the response that it asks to judge, if the data name them.
        self.judged = judged
        self.since_command = since_command
        # Metrics that are logged once, with the first step that this process logs. None until the first update.
        self._once: dict[str, float] | None = None
        self.dead_steps = 0

    def checkpointed_parts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the policy's shards: objects with state_dict and load_state_dict, by name."""
        parts: dict[str, Any] = {"controller": self, "prompts": self.batches}
        if self.evaluator is not None:
            parts["evaluator"] = self.evaluator
        return parts

    def step(self) -> None:
        """One step, from prompts to a new version of the weights."""
        # 1. Rollouts, filtered by accuracy. The newest weights sample them; with one_ahead, those of the step before.
        # Step n begins with version n. sleep() does something only where engines share the policy's GPUs.
        with self.timer.phase("generate"):
            batch = self.batches.take(step=self.step_number, version=self.step_number)
            self.rollouts.sleep()
        age, collected = self._age(batch), batch.collected
        # 2. Rewards and advantages, from the score distributions that came with the rollouts.
        with self.timer.phase("advantages"):
            groups = [self._train_group(group) for group in collected.kept]
            stats = rollout_metrics(
                collected.sampled, groups, self.scale, renormalise=self.settings.renormalise, judged=self.judged
            )
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
            # An evaluation under way may find these weights to be the best: they are exported before they change.
            self._finish_evaluation()
        with self.timer.phase("train"):
            trained = self.policy.train(groups)
        if self._once is None:
            self._once = {"seconds/first_step": self.since_command()}
        with self.timer.phase("generate"):
            self.batches.wait()
        self.step_number += 1
        # 5. The engines get the new weights, and their log-probs are compared with the policy's.
        self._finish_evaluation()  # what it stops for is no fault of the sync
        try:
            synced = self._sync()
        except RunError:
            logger.error(
                "the weight sync after step %d: %s",
                self.step_number,
                self.log.keep_batch(self.step_number, groups, trained),
            )
            raise
        # 6. Logs.
        metrics = {**stats, **trained, **sampling_metrics(collected), **synced, "rollouts/age": age}
        metrics.update(speed_metrics(self.timer.pop(), batch))
        self._log_step(metrics, collected, groups)
        self._heed_skipped(trained, groups)
        # Without a checkpoint of this step: it would be one of a run that learns nothing.
        self._stop_if_nothing_is_learned(groups)
        self._heed(self.watches.step(metrics))
        # 7. Evaluation and checkpoint.
        self._end_step()

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
            # Another one for every step and wave, as long as a step has at most 101 waves.
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
        if self.settings.dead_steps and self.dead_steps == max(self.settings.dead_steps // 2, 1):
            self.log.warn(
                self.step_number,
                "dead",
                f"no group had rewards that differ, for {self.dead_steps} steps in a row; the run stops at "
                f"{self.settings.dead_steps} (--real.dead_steps). Raise --rollout.temperature, or sample more rollouts "
                "per prompt (--rollout.n_samples_per_prompt).",
            )
        if self.settings.dead_steps and self.dead_steps >= self.settings.dead_steps:
            raise NothingLearned(
                f"{self.dead_steps} steps in a row had no group whose rewards differ: Term 1 learns nothing. Raise "
                "--rollout.temperature, sample more rollouts per prompt, or look at the judgements in samples.jsonl "
                "(--real.dead_steps sets this limit, 0 switches it off)."
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "dead_steps": self.dead_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.dead_steps = state["dead_steps"]
