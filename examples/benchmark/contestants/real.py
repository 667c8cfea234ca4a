"""This project's step: `RealPolicyActor`, as a run calls it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from examples.benchmark.contestants.common import (
    MAX_STEPS,
    Outcome,
    Setup,
    arguments,
    set_checkpointing,
    set_sizes,
    single_rank,
)
from examples.benchmark.protocol import Case
from examples.benchmark.rollouts import SCALE
from examples.benchmark.timers import Timers
from real_openrlhf.actors.policy.model import PolicyOutputs
from real_openrlhf.actors.policy.policy_actor import PolicySpec, RealPolicyActor
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import Group, TrainGroup, group_scores


class Contestant:
    """Phases are timed around the actor's calls to its model and its strategy; nothing else is touched."""

    overrides: ClassVar[list[str]] = []

    def __init__(self, setup: Setup) -> None:
        self.timers = Timers(setup.device)
        self.args = arguments(setup)
        self.objective = RealObjective()
        self.actor = RealPolicyActor(1, 0, *single_rank())
        self.actor.build(
            PolicySpec(
                path=setup.model,
                args=self.args,
                device=setup.device,
                attn_implementation="auto",
                ranks_per_node=1,
                values=SCALE.values,
                options=LossOptions(),
                trains_score_token=self.objective.trains_score_token,
                # These would be computed every tenth step, for the log only.
                term_grad_norm_steps=0,
                norms_at_parameters=False,
                max_steps=MAX_STEPS,
                bucket_bytes=2**28,
                logits_mb=setup.logits_mb,
            )
        )
        self._logprob_sums: list[Tensor] = []
        model, strategy = self.actor.actor, self.actor.strategy
        model.forward = self._summed(self.timers.wrap("forward", model.forward))
        strategy.backward = self.timers.wrap("backward", strategy.backward)
        strategy.optimizer_step = self.timers.wrap("optimizer", strategy.optimizer_step)

    @property
    def network(self) -> Any:
        return self.actor.actor.model.module

    def prepare(self, case: Case, group: Group) -> None:
        set_sizes(self.args, case)
        set_checkpointing(self.network, self.args, case)
        self.group = group

    def step(self) -> Outcome:
        self._logprob_sums = []
        target = SCALE.target(self.group.label)
        coefficients = self.objective(group_scores(self.group, SCALE.tensor(), target))
        metrics = self.actor.train([TrainGroup(group=self.group, target=target, coefficients=coefficients)])
        return Outcome(
            loss=metrics["loss/total"],
            facts={
                "logprob_sum": float(sum(float(s) for s in self._logprob_sums)),
                "grad_norm": metrics["policy/grad_norm"],
                "expected_score": metrics["policy/expected_score"],
            },
        )

    def _summed(self, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> PolicyOutputs:
            outputs: PolicyOutputs = forward(*args, **kwargs)
            self._logprob_sums.append(outputs.token_logprobs.detach().sum())
            return outputs

        return call
