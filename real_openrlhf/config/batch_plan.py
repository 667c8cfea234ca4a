"""The batch arithmetic of a configuration: rollouts, updates and steps."""

from __future__ import annotations

from dataclasses import dataclass

from real_openrlhf.algo.choices import Ratio
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch arithmetic of a run. Counts of rollouts and updates are those of a full step.

    n_prompts            training prompts
    ranks                policy ranks
    prompts_per_step, samples_per_step     prompts and rollouts of a step
    samples_per_update   rollouts per optimizer update, over all ranks
    updates_per_epoch, updates_per_step    optimizer updates per pass over a step's rollouts, and in all
    samples_per_rank     rollouts per update and rank
    steps_by_data        for how many steps the prompts last; fewer if dynamic sampling refills
    total_steps          the same, or --train.max_steps if that is smaller
    total_updates        optimizer updates of the whole run, for the learning-rate schedule
    at_most              refilling makes the number of steps an upper bound
    """

    n_prompts: int
    ranks: int
    prompts_per_step: int
    samples_per_step: int
    samples_per_update: int
    updates_per_epoch: int
    updates_per_step: int
    samples_per_rank: int
    steps_by_data: int
    total_steps: int
    total_updates: int
    at_most: bool


def updates_per_step(config: Config) -> int:
    """Optimizer updates of a full step, over all epochs."""
    return max(config.samples_per_step // config.samples_per_update, 1) * config.train.max_epochs


def resolve_ratio(config: Config) -> Ratio:
    """--real.ratio in the loss's terms.

    A single update per batch is on-policy, unless clip is asked for, or the batch was sampled by weights that are one
    version old: then the ratio is clipped, or truncated importance weights (is_correction_level) replace it.
    """
    if config.real.ratio == "clip":
        return "clip"
    if updates_per_step(config) == 1 and (not config.train.async_enable or config.corrects_importance):
        return "on_policy"
    return "clip" if config.real.ratio == "auto" else "none"


def batch_plan(config: Config, n_prompts: int) -> BatchPlan:
    """Raises ConfigError when the prompts do not fill a single step. The configuration must be valid."""
    episodes, prompts = config.train.num_episodes, config.rollout.batch_size
    # The prompt stream continues from one episode into the next; only the last, incomplete batch is left out.
    by_data = n_prompts * episodes // prompts
    if by_data == 0:
        name = "train" if config.supervised else "rollout"
        raise ConfigError(
            f"{n_prompts} prompts x --train.num_episodes {episodes} do not fill one step of --{name}.batch_size "
            f"{prompts}; lower the batch size or raise the number of episodes"
        )
    total = by_data if config.train.max_steps is None else min(by_data, config.train.max_steps)
    updates = updates_per_step(config)
    per_rank = config.samples_per_update // config.ranks
    return BatchPlan(
        n_prompts=n_prompts,
        ranks=config.ranks,
        prompts_per_step=prompts,
        samples_per_step=config.samples_per_step,
        samples_per_update=config.samples_per_update,
        updates_per_epoch=updates // config.train.max_epochs,
        updates_per_step=updates,
        samples_per_rank=per_rank,
        steps_by_data=by_data,
        total_steps=total,
        total_updates=total * updates,
        at_most=config.real.refill and total == by_data,
    )
