"""Trains the policy on groups: OpenRLHF's PPO trainer with REAL's batch, forward pass and loss.

For each rollout and update there is one forward and one backward pass, and a prompt is computed once for all of its
rollouts in a micro-batch. The log-probs at sampling time came with the rollouts, so nothing is computed before the
update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

from real_openrlhf.actors.policy.finite import LargestGradient, finite_rows
from real_openrlhf.actors.policy.model import PolicyModel, PolicyOutputs
from real_openrlhf.actors.policy.strategy import PolicyStrategy, equal_micro_batches
from real_openrlhf.actors.policy.term_norms import ParameterNorms, term_norms
from real_openrlhf.algo.batch import RealBatch, Row, collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.types import Denominators, LossInputs, TrainGroup


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step, over all ranks: sums over its rollouts and tokens, and values that exist once per update.

    skipped: what was NaN or infinite, so that the step was not made and the rest here means nothing: "rollouts",
    "loss" or "gradients"; "" for a step that was made.
    """

    sums: dict[str, float]
    denominators: Denominators
    values: dict[str, float]
    skipped: str = ""


class RealTrainer(ActorPPOTrainer):
    """Replaces the replay buffer by groups, and PolicyLoss by `policy_loss`; one instance per rank."""

    def __init__(
        self,
        strategy: PolicyStrategy,
        actor: PolicyModel,
        optimizer: Any,
        scheduler: Any,
        *,
        values: torch.Tensor,
        options: LossOptions,
        trains_score_token: bool,
        term_grad_norm_steps: int,
        norms_at_parameters: bool = False,
    ) -> None:
        # ActorPPOTrainer.__init__ builds a replay buffer, PolicyLoss and a CUDA weight-sync group;
        # none of them is used here, so only its attributes are set.
        self.strategy = strategy
        self.args = strategy.args
        self.actor = actor
        self.actor_optim = optimizer
        self.actor_scheduler = scheduler
        self.max_epochs = self.args.train.max_epochs
        self.values = values
        self.options = options
        self.trains_score_token = trains_score_token
        self.term_grad_norm_steps = term_grad_norm_steps
        self.norms_at_parameters = norms_at_parameters
        self.gradient = LargestGradient(actor.parameters())
        self.n_calls = 0
        self.n_updates = 0
        self.n_forwards = 0
        self.n_backwards = 0

    def ppo_train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """All updates of one batch on this rank's groups; metrics over all ranks."""
        self.actor.train()
        per_update = self.args.train.batch_size // self.strategy.world_size
        with_norms = self.term_grad_norm_steps > 0 and self.n_calls % self.term_grad_norm_steps == 0
        updates = [
            self._update(update, with_norms=with_norms)
            for epoch in range(self.max_epochs)
            for update in self._updates(groups, per_update, epoch)
        ]
        self.n_calls += 1
        return _metrics(updates, kl=self.options.kl_coef > 0)

    def _updates(self, groups: Sequence[TrainGroup], per_update: int, epoch: int) -> Iterator[list[Row]]:
        """The rows of each optimizer step. One update takes all groups; with several, each epoch shuffles the groups.

        Groups stay together, so that their rollouts share the prompt and their advantages balance; only one that
        falls on the border of two updates is divided. The last update is smaller when dynamic sampling without
        refill left fewer groups.
        """
        rows = rows_of(groups)
        if len(rows) > per_update:
            generator = torch.Generator().manual_seed(hash((self.args.train.seed, self.n_calls, epoch)) % 2**31)
            rows = rows_of([groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()])
        for start in range(0, len(rows), per_update):
            yield rows[start : start + per_update]

    def _update(self, rows: list[Row], *, with_norms: bool) -> Update:
        """Skipped, on all ranks alike, when a number that it takes or gives on any rank is not finite."""
        denominators = self._global(denominators_of(rows, trains_score_token=self.trains_score_token))
        if self._anywhere(not finite_rows(rows)):
            return Update(sums={}, denominators=denominators, values={}, skipped="rollouts")
        self.gradient.reset()
        sums: dict[str, float] = {}
        largest: float | None = None
        norms = ParameterNorms(self.actor.parameters()) if with_norms and self.norms_at_parameters else None
        parts = equal_micro_batches(rows, self.strategy)
        for number, part in enumerate(parts, start=1):
            batch = collate(part).to(self.strategy.device.current())
            self.strategy.mark_boundary(self.actor, last=number == len(parts))
            if norms is not None:
                with self.actor.without_deepspeed():
                    norms.add(self._terms(batch, denominators))
            got = self.training_step(batch, denominators, with_norms=with_norms)
            if "logprob_difference_max" in got:
                largest = max(largest or 0.0, got.pop("logprob_difference_max"))
            for name, value in got.items():
                sums[name] = sums.get(name, 0.0) + value
        sums = self.strategy.sum_over_ranks(sums)
        finite_loss = all(math.isfinite(value) for name, value in sums.items() if name.startswith("loss/"))
        if self._anywhere(not self.gradient.finite) or not finite_loss:
            self.strategy.skip_step(self.actor)
            skipped = "gradients" if finite_loss else "loss"
            return Update(sums={}, denominators=denominators, values={}, skipped=skipped)
        # Read before the step, which advances the schedule.
        lr = float(self.actor_scheduler.get_last_lr()[0])
        self.strategy.optimizer_step(self.actor_optim, self.actor, self.actor_scheduler, name="actor")
        self.n_updates += 1
        values = {name: value for name, value in sums.items() if name.startswith("loss/")}
        values["loss/total"] = sum(values.values())
        for name, value in sums.items():
            if name.startswith("square/"):
                values[f"logit_grad_norm/{name.removeprefix('square/')}"] = math.sqrt(max(value, 0.0))
        if norms is not None:
            values |= norms.norms(self.strategy)
        if largest is not None:
            values["rollout_gap/logprob_max"] = self.strategy.max_over_ranks(largest)
        values["policy/grad_norm"] = self.strategy.get_grad_norm(self.actor)
        values["policy/lr"] = lr
        return Update(sums=sums, denominators=denominators, values=values)

    def training_step(  # type: ignore[override]
        self, batch: RealBatch, denominators: Denominators, *, with_norms: bool = False
    ) -> dict[str, float]:
        """One micro-batch: forward, loss, backward."""
        entropy_grad = bool(self.args.actor.entropy_coef)
        outputs = self.actor(batch, entropy_grad=entropy_grad, moments=with_norms)
        self.n_forwards += len(batch)
        inputs = loss_inputs(batch, outputs.token_logprobs, outputs.label_logprobs, self.values, outputs.entropy)
        # DeepSpeed averages gradients over ranks; the loss is a sum over them.
        scale = float(self.strategy.world_size)
        result = policy_loss(inputs, options=self.options, denominators=denominators, loss_scale=scale)
        part = dict(result.sums)
        part.update({f"loss/{name}": float(term.detach()) for name, term in result.terms.items()})
        if with_norms:
            part.update(self._term_norms(outputs, batch, denominators))
        self.strategy.backward(result.loss, self.actor, self.actor_optim)
        self.n_backwards += len(batch)
        return part

    def _terms(self, batch: RealBatch, denominators: Denominators) -> dict[str, torch.Tensor]:
        """The loss's terms, from a separate forward pass."""
        outputs = self.actor(batch, entropy_grad=False, moments=False)
        inputs = loss_inputs(batch, outputs.token_logprobs, outputs.label_logprobs, self.values, outputs.entropy)
        return policy_loss(inputs, options=self.options, denominators=denominators).terms

    def _term_norms(self, outputs: PolicyOutputs, batch: RealBatch, denominators: Denominators) -> dict[str, float]:
        """Squared norm of each term's gradient at the logits of this micro-batch."""

        def terms_of(tokens: torch.Tensor, labels: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
            inputs = loss_inputs(batch, tokens, labels, self.values, entropy)
            return policy_loss(inputs, options=self.options, denominators=denominators).terms

        norms = term_norms(outputs, batch, terms_of, temperature=self.actor.temperature)
        return {f"square/{name}": value for name, value in norms.items()}

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return self.strategy.sum_over_ranks({"here": float(here)})["here"] > 0

    def _global(self, local: Denominators) -> Denominators:
        return Denominators(**self.strategy.sum_over_ranks(vars(local)))


def loss_inputs(
    batch: RealBatch,
    token_logprobs: torch.Tensor,
    label_logprobs: torch.Tensor,
    values: torch.Tensor,
    entropy: torch.Tensor | None = None,
) -> LossInputs:
    """The loss's inputs, from a batch and from what the policy computed for it."""
    return LossInputs(
        token_logprobs=token_logprobs,
        label_logprobs=label_logprobs,
        readable=batch.readable,
        cot_mask=batch.cot_mask,
        score_mask=batch.score_mask,
        response_mask=batch.response_mask,
        cot=batch.cot,
        score=batch.score,
        squared_error=batch.squared_error,
        likelihood=batch.likelihood,
        targets=batch.targets,
        values=values.to(token_logprobs),
        rollout_logprobs=batch.rollout_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=entropy,
    )


def _metrics(updates: Sequence[Update], *, kl: bool) -> dict[str, float]:
    """Metrics of a batch, of the updates that were made, and how many were skipped for which reason."""
    skipped = [update.skipped for update in updates if update.skipped]
    made = [update for update in updates if not update.skipped]
    counts = {f"skipped/{reason}": float(skipped.count(reason)) for reason in sorted(set(skipped))}
    counts["policy/skipped_updates"] = float(len(skipped))
    return {**(_metrics_of(made, kl=kl) if made else {"policy/updates": 0.0}), **counts}


def _metrics_of(updates: Sequence[Update], *, kl: bool) -> dict[str, float]:
    """Means over all rollouts or tokens of all updates, never means of means.

    Values that exist once per update (loss terms, norms) are averaged over the updates. The gap to the
    rollouts' log-probs is that of the first update, which is on-policy; the learning rate is the last update's.
    """
    first = updates[0]
    metrics = {name: sum(u.values[name] for u in updates) / len(updates) for name in first.values}
    total = {name: sum(u.sums[name] for u in updates) for name in first.sums}
    actions = max(sum(u.denominators.action_tokens for u in updates), 1.0)
    tokens = max(sum(u.denominators.response_tokens for u in updates), 1.0)
    readable = max(total["readable"], 1.0)
    metrics["policy/expected_score"] = total["expected_score"] / readable
    metrics["policy/abs_error"] = total["expected_error"] / readable
    metrics["policy/mass"] = total["mass"] / readable
    metrics["policy/clipped_share"] = total["clipped"] / actions
    if "entropy" in total:
        metrics["policy/entropy"] = total["entropy"] / tokens
    if kl:
        metrics["policy/kl"] = total["kl"] / tokens
    if "logprob_difference" in first.sums:  # not of given responses
        first_tokens = max(first.denominators.response_tokens, 1.0)
        metrics["rollout_gap/logprob_mean"] = first.sums["logprob_difference"] / first_tokens
        metrics["rollout_gap/kl"] = first.sums["rollout_kl"] / first_tokens
        metrics["rollout_gap/logprob_max"] = first.values["rollout_gap/logprob_max"]
    metrics["policy/lr"] = updates[-1].values["policy/lr"]
    metrics["policy/updates"] = float(len(updates))
    return metrics
