"""Watches over a run: do its metrics show that it goes wrong?

Every watch looks at the metrics of each step, or of each evaluation, and reports a fault or none. A fault that is seen
often enough in a row becomes a warning, and later a reason to stop. Numbers of single steps are noisy, so a moving
average is compared with the average of the first steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from real_openrlhf.common.errors import RunError
from real_openrlhf.config.guard_flags import GuardConfig
from real_openrlhf.controller.reward_hacking import hacking_faults
from real_openrlhf.controller.series import Series

if TYPE_CHECKING:
    from real_openrlhf.evals.change import Change

Metrics = Mapping[str, float | None]


class WentWrong(RunError):
    """A watch has seen the same fault for too long."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """watch: its name in `config.guard_flags.WATCHES`. message: what happened, with numbers, and what helps.

    stops: the run should end now.
    """

    watch: str
    message: str
    stops: bool


class Guards:
    """All watches of a run; their state is part of checkpoints.

    scale_range: the highest value of the score scale minus the lowest.
    held_out_reward: watch the held-out reward; not where training maximises another one.
    """

    def __init__(self, flags: GuardConfig, *, scale_range: float, held_out_reward: bool = True) -> None:
        self.flags = flags
        self.held_out_reward = held_out_reward
        self.scale_range = scale_range
        self._series: dict[str, Series] = {}
        # Faults in a row, by watch.
        self._steps: dict[str, int] = {}
        self._evaluations: dict[str, int] = {}
        self._start_mass: float | None = None
        self._since_norms = 0

    def step(self, metrics: Metrics) -> list[Alarm]:
        """After a training step, with its metrics."""
        faults = {
            "mass": self._mass(metrics),
            "reward": self._reward(metrics),
            "scores": self._scores(metrics),
            "length": self._length(metrics),
            "entropy": self._entropy(metrics),
            "invalid": self._invalid(metrics),
            "gap": self._gap(metrics),
            "still": self._still(metrics),
            "dead": self._dead(metrics),
            **hacking_faults(metrics, self._add, self.flags, self.scale_range),
        }
        self._since_norms += 1
        measured: dict[str, int] = {}
        if measured_norms(metrics) is not None:
            # Not measured at every step: two faults in a row count for the steps between them as well.
            faults["terms"] = self._terms(metrics)
            measured["terms"], self._since_norms = self._since_norms, 0
        every = self.flags.warn_steps, self.flags.stop_steps
        return self._count(faults, self._steps, *every, unit="steps", measured=measured)

    def evaluation(self, metrics: Metrics, changes: Mapping[str, Change]) -> list[Alarm]:
        """After an evaluation.

        metrics  by flat name, such as "mass"
        changes  since the run's first evaluation; empty at the first
        """
        faults = {"mass": self._held_out_mass(metrics), "evaluation": self._worse(changes)}
        return self._count(faults, self._evaluations, 1, self.flags.stop_evaluations, unit="evaluations")

    def _count(
        self,
        faults: Mapping[str, str | None],
        counts: dict[str, int],
        warn_at: int,
        stop_at: int,
        *,
        unit: str,
        measured: Mapping[str, int] = MappingProxyType({}),
    ) -> list[Alarm]:
        """Alarms for the faults that were seen often enough in a row.

        measured: steps since a watch's metric was last measured, where it is not measured at every step.
        """
        alarms = []
        for watch, fault in faults.items():
            before = counts.get(watch, 0)
            # A first fault counts 1, a further one the steps since its metric was measured last.
            seen = before + measured.get(watch, 1) if before else 1
            n = counts[watch] = seen if fault else 0
            stops = watch in self.flags.stop and n >= stop_at
            if fault and (stops or before < warn_at <= n):
                name = unit.removesuffix("s") if n == 1 else f"{unit} in a row"
                alarms.append(Alarm(watch=watch, message=f"{fault} Seen for {n} {name}.", stops=stops))
        return alarms

    # -- what each watch sees: the fault in words, or None -----------------------------------------------------

    def _mass(self, metrics: Metrics) -> str | None:
        series = self._add("mass", metrics.get("score/mass"))
        return self._mass_fault(series.start, series.now) if series.full else None

    def _held_out_mass(self, metrics: Metrics) -> str | None:
        mass = metrics.get("mass")
        if self._start_mass is None:
            self._start_mass = mass
        return self._mass_fault(self._start_mass, mass, where=" of held-out prompts")

    def _mass_fault(self, start: float | None, now: float | None, where: str = "") -> str | None:
        drop = self.flags.mass_drop
        if drop is None or start is None or now is None or now >= start - drop:
            return None
        return (
            f"The mean mass on the scale{where} fell from {start:.3f} to {now:.3f}: the network writes other tokens "
            "where the score belongs. Give Term 2 its full weight (--real.beta 1) or lower --actor.adam.lr "
            "(limit: --guard.mass_drop)."
        )

    def _reward(self, metrics: Metrics) -> str | None:
        # The mean over all sampled groups: those that dynamic sampling keeps get harder as the judge gets better.
        series = self._add("reward", metrics.get("reward/sampled_mean"))
        limit = self.flags.reward_errors
        if limit is None or not series.full or self.flags.window < 2:
            return None
        error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (series.first, series.last)))
        if series.now >= series.start - limit * error:
            return None
        return (
            f"The mean reward fell from {series.start:.3f} to {series.now:.3f}, by more than {limit:g} standard errors "
            f"of the difference ({error:.3f}): training lowers what it should raise. Lower --actor.adam.lr, or use "
            "--real.preset exact (limit: --guard.reward_errors)."
        )

    def _scores(self, metrics: Metrics) -> str | None:
        series, share = self._add("spread", metrics.get("score/expected_std")), self.flags.min_spread
        if share is None or not series.full or series.now >= share * self.scale_range:
            return None
        return (
            f"E[score] has collapsed to one value: its standard deviation is {series.now:.4f}, it began with "
            f"{series.start:.4f}. Lower --actor.adam.lr, or hold the policy at its start (--algo.kl.init_coef) "
            "(limit: --guard.min_spread)."
        )

    def _length(self, metrics: Metrics) -> str | None:
        cut = self._add("truncated", metrics.get("length/truncated_share"))
        cot = self._add("cot", metrics.get("length/cot"))
        most, least = self.flags.max_truncated, self.flags.min_cot
        if most is not None and cut.full and cut.now > most:
            return (
                f"{cut.now:.0%} of the responses are truncated at the token limit (the start: {cut.start:.0%}). Give "
                "them more room (--rollout.max_new_tokens), or lower the reward of those without a score "
                "(--real.invalid_penalty) (limit: --guard.max_truncated)."
            )
        if least is not None and cot.full and cot.now < least:
            return (
                f"Feedback has {cot.now:.2f} tokens on average (the start: {cot.start:.2f}): without feedback Term 1 "
                "has nothing to train. Lower --actor.adam.lr, or warm the model up on judgements with feedback: "
                "real_openrlhf.train_warmup (limit: --guard.min_cot)."
            )
        return None

    def _entropy(self, metrics: Metrics) -> str | None:
        series, share = self._add("entropy", metrics.get("rollouts/entropy")), self.flags.min_entropy
        if share is None or not series.full or series.now >= share * series.start:
            return None
        return (
            f"The entropy per sampled token fell from {series.start:.4f} to {series.now:.4f} nats: rollouts of a "
            "prompt are all alike and nothing is explored. Add an entropy bonus (--actor.entropy_coef), raise "
            "--rollout.temperature or lower --actor.adam.lr (limit: --guard.min_entropy)."
        )

    def _invalid(self, metrics: Metrics) -> str | None:
        series, limit = self._add("invalid", metrics.get("invalid/rate")), self.flags.max_invalid
        if limit is None or not series.full or series.now <= limit:
            return None
        return (
            f"{series.now:.0%} of the rollouts have no readable score (the start: {series.start:.0%}): their rewards "
            "say nothing about the judgement. Warm the model up on judgements (real_openrlhf.train_warmup), see that "
            "--real.anchor is what it writes, or lower the reward of those without a score (--real.invalid_penalty) "
            "(limit: --guard.max_invalid)."
        )

    def _gap(self, metrics: Metrics) -> str | None:
        series, limit = self._add("gap", metrics.get("rollout_gap/logprob_mean")), self.flags.max_gap
        if limit is None or not series.full or series.now <= limit:
            return None
        return (
            f"Log-probs of the sampled tokens differ by {series.now:.3f} nats per token between engine and policy (the "
            f"start: {series.start:.3f}): training corrects what was not sampled. Use the same precision and attention "
            "in both, correct the difference (--algo.advantage.is_correction_level token), or go without "
            "--train.async_enable (limit: --guard.max_gap)."
        )

    def _still(self, metrics: Metrics) -> str | None:
        moved, limit = metrics.get("sync/policy_moved"), self.flags.min_move
        if limit is None or moved is None or moved > limit:
            return None
        return (
            f"The step changed the policy's log-probs by {moved:.1e} per token: the weights do not move. Raise "
            "--actor.adam.lr (in bf16 without master weights, small steps are rounded away), and see that "
            "policy/grad_norm is not 0 (limit: --guard.min_move)."
        )

    def _dead(self, metrics: Metrics) -> str | None:
        series, limit = self._add("dead", metrics.get("advantage/zero_variance_share")), self.flags.max_dead
        if limit is None or not series.full or series.now <= limit:
            return None
        return (
            f"In {series.now:.0%} of the groups all rewards are equal (the start: {series.start:.0%}): Term 1 learns "
            "nothing from them. Raise --rollout.temperature, sample more rollouts per prompt "
            "(--rollout.n_samples_per_prompt), or drop such groups (--real.keep_groups) (limit: --guard.max_dead)."
        )

    def _terms(self, metrics: Metrics) -> str | None:
        norms, limit = measured_norms(metrics), self.flags.max_term_ratio
        if limit is None or norms is None:
            return None
        where, first, second = norms
        if max(first, second) <= limit * min(first, second):
            return None
        more, less, ratio = ("1", "2", first / second) if first > second else ("2", "1", second / first)
        return (
            f"The gradient of Term {more} is {ratio:.0f} times that of Term {less} at the {where} ({first:.2g} and "
            f"{second:.2g}): one of the two decides the update alone. --real.beta weighs Term 2; 1 is the gradient of "
            "the reward itself (limit: --guard.max_term_ratio)."
        )

    def _worse(self, changes: Mapping[str, Change]) -> str | None:
        if not self.flags.evaluation:
            return None
        worse = [
            f"{_TITLES[name]} fell by {-c.difference:.3f} (95% paired interval {-c.high:.3f} to {-c.low:.3f})"
            for name, c in changes.items()
            if c.high < 0 and (name != _REWARD or self.held_out_reward)
        ]
        if not worse:
            return None
        return (
            f"The judge is worse on held-out prompts than at the start: {' and '.join(worse)}. Lower "
            "--actor.adam.lr, or use --real.preset exact. The best judge so far, by --ckpt.best_metric_key, is kept. "
            "--no-guard.evaluation switches this watch off."
        )

    def _add(self, name: str, value: float | None) -> Series:
        series = self._series.setdefault(name, Series(self.flags.window, [], []))
        series.add(value)
        return series

    def state_dict(self) -> dict[str, Any]:
        return {
            "series": {name: {"first": s.first, "last": s.last} for name, s in self._series.items()},
            "steps": self._steps,
            "evaluations": self._evaluations,
            "start_mass": self._start_mass,
            "since_norms": self._since_norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._series = {name: Series(self.flags.window, s["first"], s["last"]) for name, s in state["series"].items()}
        self._steps, self._evaluations = dict(state["steps"]), dict(state["evaluations"])
        self._start_mass = state["start_mass"]
        self._since_norms = state.get("since_norms", 0)


_REWARD = "reward"
_TITLES = {_REWARD: "the mean reward", "expected/pearson": "Pearson of E[score]"}


def measured_norms(metrics: Metrics) -> tuple[str, float, float] | None:
    """Where the gradient norms of Term 1 and Term 2 were measured, and both norms.

    None if they were not measured at this step, or if one of the terms is off.
    """
    at_parameters = metrics.get("param_grad_norm/term1"), metrics.get("param_grad_norm/term2")
    parts = metrics.get("logit_grad_norm/squared_error"), metrics.get("logit_grad_norm/likelihood")
    # Both parts of Term 2 have gradients at the same logits. Their sum is an upper bound: they may point the same way.
    second = None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    candidates: list[tuple[str, float | None, float | None]] = [
        ("parameters", *at_parameters),
        ("logits", metrics.get("logit_grad_norm/cot"), second),
    ]
    for where, first, second in candidates:
        if first and second:
            return where, first, second
    return None
