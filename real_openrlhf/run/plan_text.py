"""A run's plan as plain text: --dry_run prints it, and a run's log begins with it."""

from __future__ import annotations

from collections.abc import Callable

from real_openrlhf.algo.bound_scale import BoundScale, decode
from real_openrlhf.common.device import Device
from real_openrlhf.config.batch_plan import BatchPlan, resolve_ratio
from real_openrlhf.config.convert import get_value
from real_openrlhf.config.presets import preset_values
from real_openrlhf.config.schema import Config
from real_openrlhf.run.inputs import Inputs
from real_openrlhf.run.memory_text import memory_lines, time_lines
from real_openrlhf.run.plan import RunPlan

# How many characters of a prompt's beginning and end are shown.
_SHOWN = 400


def render(plan: RunPlan, *, for_log: bool = False) -> str:
    """One section per subject; warnings come last, if there are any.

    for_log: leave out the prompt, which may be private, and the warnings, which a run logs separately.
    """
    config, inputs = plan.config, plan.inputs
    expected = plan.forecast
    time = None if expected is None else expected.time
    sections = [
        ("Model", _model_lines(config, plan.device)),
        ("Placement", [*_assumed_lines(inputs), *(str(request) for request in plan.placement)]),
        ("Batch", _batch_lines(config, plan.batch, inputs.bound, plan.reward_tolerance)),
        ("Steps", _step_lines(config, plan.batch)),
        ("Memory", [] if expected is None else memory_lines(expected.memory)),
        ("Time", [] if time is None else time_lines(time, plan.batch.total_steps, at_most=plan.batch.at_most)),
        ("First prompt", [] if for_log else _prompt_lines(inputs)),
        ("Score tokens", _score_lines(inputs.bound, lambda token: inputs.tokenizer.decode([token]))),
        ("Preset", _preset_lines(config)),
    ]
    sections.append(("Warnings", [] if for_log else list(plan.warnings)))
    shown = [(title, lines) for title, lines in sections if lines]
    return "\n".join(line for title, lines in shown for line in [title, *(f"  {text}" for text in lines)])


def _model_lines(config: Config, device: Device) -> list[str]:
    lines = [
        f"{config.actor.model_name_or_path}, {device.dtype_name} on {device.name}, ZeRO {config.ds.zero_stage}",
        f"prompts: {config.data.prompt_dataset}; output: {config.ckpt.output_dir or 'none'}",
    ]
    if config.ds.lora.rank:
        lines.append(f"LoRA adapters: {config.ds.lora}")
    kl = config.algo.kl
    if kl.init_coef:
        where = f"{config.reference_ranks} separate rank(s)" if config.reference_ranks else "the policy, adapters off"
        lines.append(f"KL: weight {kl.init_coef:g}, estimator {kl.estimator}; reference: {where}")
    return lines


def _assumed_lines(inputs: Inputs) -> list[str]:
    return [] if inputs.assumed_gpus is None else [f"on GPUs that are not here: {inputs.assumed_gpus}"]


def _batch_lines(config: Config, plan: BatchPlan, bound: BoundScale, tolerance: float) -> list[str]:
    if config.supervised:
        return _warmup_lines(config, plan)
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
    lines.append(f"rewards of one prompt that differ by less than {tolerance:g} count as equal")
    return lines


def _warmup_lines(config: Config, plan: BatchPlan) -> list[str]:
    first = {"missing": "rows without a response", "sampled": "every row"}.get(config.warmup.feedback)
    objective = {"sft": "cross-entropy", "raft": "squared error of E[score], and lambda times the cross-entropy"}
    return [
        f"{config.warmup.method}: {objective[config.real.objective]}, on given responses",
        f"{plan.prompts_per_step} rows per update, {plan.samples_per_rank} on each of {plan.ranks} rank(s); up to "
        f"{config.rollouts_per_pass} rows and {config.train.max_tokens_per_gpu} tokens per forward pass",
        f"up to {config.data.max_len} tokens of prompt and response together",
        *([f"before that, the model writes feedback for {first}"] if first else []),
    ]


def _prompt_lines(inputs: Inputs) -> list[str]:
    """The first training prompt as the model gets it, its beginning and end, and the human score.

    Of a warm-up the response as well, which is what is learned.
    """
    prompt = inputs.train_set.prompts[0]
    how = "through the chat template" if inputs.template.apply_chat_template else "without a chat template"
    lines = [f"{len(prompt.token_ids)} tokens, {how}, human score {prompt.label:g}:"]
    lines += _shown(decode(inputs.tokenizer, prompt.token_ids))
    if inputs.given is not None:
        response = inputs.given.responses.get(prompt.row)
        if response is None:
            lines.append("its response is still to be written: feedback by the model, then the human score")
        else:
            lines.append(f"its response, {len(response)} tokens, which are learned:")
            lines += _shown(decode(inputs.tokenizer, response))
    return lines


def _shown(text: str) -> list[str]:
    return (text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} [...] {text[-_SHOWN:]}").splitlines()


def _step_lines(config: Config, plan: BatchPlan) -> list[str]:
    bound = "at most " if plan.at_most else ""
    every = "" if config.eval.steps < 0 else f", every {config.eval.steps} steps"
    return [
        f"{plan.n_prompts} {'rows' if config.supervised else 'prompts'} x {config.train.num_episodes} episode(s): "
        f"{bound}{plan.total_steps} steps, "
        f"{bound}{plan.total_updates} updates",
        "no evaluation" if config.eval.dataset is None else f"evaluation before training{every}, and at the end",
    ]


def _score_lines(bound: BoundScale, read: Callable[[int], str]) -> list[str]:
    lines = []
    for anchor in bound.anchors:
        lines.append(f"after {anchor.prefix!r} (anchor {anchor.text!r}):")
        for value, label, tokens in zip(bound.scale.values, bound.scale.labels, anchor.labels):
            shown = ", ".join(f"{token} {read(token)!r}" for token in tokens)
            lines.append(f"  {label!r} (value {value:g}) -> token{'s' if len(tokens) > 1 else ''} {shown}")
    n_branches = len(bound.anchors[0].trie.branches)
    if n_branches:
        lines.append(
            f"labels of several tokens: up to {n_branches} more sequence(s) per rollout, in which engine and policy "
            "read the labels that the rollout did not write"
        )
    return lines


def _preset_lines(config: Config) -> list[str]:
    preset = preset_values(config.real.preset)
    lines = [f"{config.real.preset}, nothing overridden" if not config.overridden else config.real.preset]
    for name in config.overridden:
        lines.append(f"--{name} {get_value(config, name)} (preset: {preset[name]})")
    return lines
