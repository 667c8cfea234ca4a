"""What a configuration comes to: batch arithmetic, steps, and the text that --dry_run prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from real_openrlhf.algo.loss import Ratio
from real_openrlhf.algo.score_scale import BoundScale
from real_openrlhf.config.convert import get_value
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.presets import PRESETS
from real_openrlhf.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch arithmetic of a run. Counts of rollouts and updates are those of a full step.

    n_prompts            training prompts
    ranks                policy ranks
    prompts_per_step, samples_per_step
    samples_per_update   rollouts per optimizer update, over all ranks
    updates_per_epoch, updates_per_step
    samples_per_rank     rollouts per update and rank
    steps_by_data        steps that the prompts last for; fewer where dynamic sampling refills
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
    """--real.ratio as the loss takes it.

    A single update per batch is on-policy, unless clip is asked for, or the batch was sampled one version ahead:
    then the ratio is clipped, or truncated importance weights (is_correction_level) stand in for it.
    """
    if config.real.ratio == "clip":
        return "clip"
    if updates_per_step(config) == 1 and (not config.train.async_enable or config.corrects_importance):
        return "on_policy"
    return "clip" if config.real.ratio == "auto" else "none"


def batch_plan(config: Config, n_prompts: int) -> BatchPlan:
    """Raises ConfigError when the prompts do not fill a single step. The configuration must be valid."""
    episodes, prompts = config.train.num_episodes, config.rollout.batch_size
    # The prompt stream runs on from one episode into the next; the last, short batch is left out.
    by_data = n_prompts * episodes // prompts
    if by_data == 0:
        raise ConfigError(
            f"{n_prompts} prompts x --train.num_episodes {episodes} do not fill one step of --rollout.batch_size "
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


def render_plan(
    config: Config,
    plan: BatchPlan,
    bound_scale: BoundScale,
    placement_lines: Sequence[str] = (),
    *,
    device: str,
    dtype: str,
    reward_tolerance: float,
    decode: Callable[[int], str] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """The resolved plan as plain text. reward_tolerance: the device's, unless a flag says another one.

    decode: token id -> its text.
    """
    tolerance = reward_tolerance if config.real.tolerance is None else config.real.tolerance
    equal = f"rewards of one prompt that differ by less than {tolerance:g} count as equal"
    sections = [
        ("Model", _model_lines(config, device, dtype)),
        ("Placement", list(placement_lines) or _placement_lines(config)),
        ("Batch", [*_batch_lines(config, plan, bound_scale), equal]),
        ("Steps", _step_lines(config, plan)),
        ("Score tokens", _score_lines(bound_scale, decode)),
        ("Preset", _preset_lines(config)),
    ]
    if warnings:
        sections.append(("Warnings", list(warnings)))
    return "\n".join(line for title, lines in sections for line in [title, *(f"  {text}" for text in lines)])


def _model_lines(config: Config, device: str, dtype: str) -> list[str]:
    lines = [
        f"{config.actor.model_name_or_path}, {dtype} on {device}, ZeRO {config.ds.zero_stage}",
        f"prompts: {config.data.prompt_dataset}; output: {config.ckpt.output_dir or 'none'}",
    ]
    if config.ds.lora.rank:
        lines.append(f"LoRA adapters: {config.ds.lora}")
    kl = config.algo.kl
    if kl.init_coef:
        where = f"{config.reference_ranks} rank(s) of its own" if config.reference_ranks else "the policy, adapters off"
        lines.append(f"KL: weight {kl.init_coef:g}, estimator {kl.estimator}; reference: {where}")
    return lines


def _placement_lines(config: Config) -> list[str]:
    own = config.eval.dataset is not None and config.eval.engine == "own"
    return [
        f"policy: {config.actor.num_nodes} node(s) x {config.actor.num_gpus_per_node} rank(s)",
        f"rollout: {config.vllm.num_engines} engine(s), tensor parallel {config.vllm.tensor_parallel_size}",
        "evaluation: " + ("off" if config.eval.dataset is None else "own engine" if own else "rollout engines"),
    ]


def _batch_lines(config: Config, plan: BatchPlan, bound: BoundScale) -> list[str]:
    k = config.rollout.n_samples_per_prompt
    prompt_tokens = config.data.max_len - config.rollout.max_new_tokens - bound.extra_tokens
    lines = [
        f"{plan.prompts_per_step} prompts x {k} rollouts = {plan.samples_per_step} rollouts per step",
        f"{plan.updates_per_step} update(s) per step ({plan.updates_per_epoch} x {config.train.max_epochs} epoch(s)) "
        f"of {plan.samples_per_update} rollouts; ratio: {resolve_ratio(config)}",
        f"{plan.samples_per_rank} rollouts per update and rank, {plan.ranks} rank(s); up to {config.rollouts_per_pass} "
        f"rollouts and {config.train.max_tokens_per_gpu} tokens per forward pass",
        f"up to {prompt_tokens} prompt and {config.rollout.max_new_tokens} response tokens",
    ]
    if config.real.filters_groups:
        refill = f"refilled up to {config.real.max_refills} times" if config.real.refill else "not refilled"
        lines.append(f"dynamic sampling: {config.real.keep_groups}, {refill}")
    return lines


def _step_lines(config: Config, plan: BatchPlan) -> list[str]:
    bound = "at most " if plan.at_most else ""
    every = "" if config.eval.steps < 0 else f", every {config.eval.steps} steps"
    return [
        f"{plan.n_prompts} prompts x {config.train.num_episodes} episode(s): {bound}{plan.total_steps} steps, "
        f"{bound}{plan.total_updates} updates",
        "no evaluation" if config.eval.dataset is None else f"evaluation before training{every}, and at the end",
    ]


def _score_lines(bound: BoundScale, decode: Callable[[int], str] | None) -> list[str]:
    lines = []
    for anchor in bound.anchors:
        lines.append(f"after {anchor.prefix!r} (anchor {anchor.text!r}):")
        for value, label, tokens in zip(bound.scale.values, bound.scale.labels, anchor.labels):
            shown = ", ".join(f"{token} {decode(token)!r}" if decode is not None else f"{token}" for token in tokens)
            lines.append(f"  {label!r} (value {value:g}) -> token{'s' if len(tokens) > 1 else ''} {shown}")
    n_branches = len(bound.anchors[0].trie.branches)
    if n_branches:
        lines.append(
            f"labels of several tokens: up to {n_branches} more sequence(s) per rollout, for engine and policy to read "
            "labels that it did not write"
        )
    return lines


def _preset_lines(config: Config) -> list[str]:
    preset = PRESETS[config.real.preset]
    lines = [f"{config.real.preset}, nothing overridden" if not config.overridden else config.real.preset]
    for name in config.overridden:
        lines.append(f"--{name} {get_value(config, name)} (preset: {preset[name]})")
    return lines
