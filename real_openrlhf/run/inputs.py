"""Loads and checks what a run's flags name: tokenizer, scale, prompts, benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from real_openrlhf.actors.engine.limits import ModelLimits
from real_openrlhf.actors.engine.spec import EngineSpecError, check_read_tokens
from real_openrlhf.algo.bound_scale import BoundScale, bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.common.device import Device
from real_openrlhf.config.batch_plan import batch_plan
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.data.dataset import JudgeDataset
from real_openrlhf.data.given import GivenDataset
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.table import template_of_built
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.data.tokenizer import end_token_ids, load_tokenizer
from real_openrlhf.evals.benchmarks import Benchmark, load_benchmark
from real_openrlhf.judge.scoring import room_for_forcing
from real_openrlhf.run.assumed_gpus import AssumedGpus
from real_openrlhf.run.early import benchmark_sources, check_samplings
from real_openrlhf.run.ray_session import cluster_to_join


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the flags name, loaded and checked.

    device          None where only the cluster that is to be joined can say
    assumed_gpus    those that are not here, of a dry run
    judge_template  of the training prompts, where `real_openrlhf.data` built them of their parts
    given           of a warm-up: the responses to the prompts of train_set; None in train_real
    """

    config: Config
    device: Device | None
    assumed_gpus: AssumedGpus | None
    tokenizer: PreTrainedTokenizerBase
    bound: BoundScale
    end_ids: frozenset[int]
    template: PromptTemplate
    judge_template: JudgeTemplate | None
    train_set: JudgeDataset
    benchmarks: tuple[Benchmark, ...]
    warnings: tuple[str, ...]
    given: GivenDataset | None = None


def load_inputs(config: Config) -> Inputs:
    """Check flags against each other, then load tokenizer, scale and data sets."""
    config = with_absolute_paths(config)
    assumed = None if config.assume_gpus is None else AssumedGpus.parse(config.assume_gpus)
    device = known_device(config)
    kind: Literal["cpu", "cuda"] | None = None if device is None else "cuda" if device.is_cuda else "cpu"
    warnings = validate(config, device=kind)
    check_samplings(config)
    check_lora(config)
    tokenizer = load_tokenizer(config.actor.model_name_or_path)
    bound = bind_scale(config.real.score_scale, tokenizer, config.real.anchor)
    limits = check_engine(config, bound)
    template = PromptTemplate(
        input_template=config.data.input_template,
        apply_chat_template=config.data.apply_chat_template,
        enable_thinking=config.data.enable_thinking,
    )

    if tokenizer.chat_template and not config.data.apply_chat_template:
        warnings.append(
            f"{config.actor.model_name_or_path} has a chat template, but prompts are given without it; an Instruct "
            "model needs --data.apply_chat_template"
        )
    end_ids = end_token_ids(config.actor.model_name_or_path, tokenizer)
    given = None
    longest = config.data.max_len - config.rollout.max_new_tokens - bound.extra_tokens
    if config.supervised:
        given = load_given(config, tokenizer, template, ScoreReader.build(bound, tokenizer, end_ids), longest)
        train_set = given.dataset
    else:
        train_set = JudgeDataset.load(
            config.data.prompt_dataset,
            max_prompt_tokens=longest,
            max_samples=config.data.max_samples,
            seed=config.train.seed,
            scale=config.real.score_scale,
            judged_key=config.data.judged_key,
            **_reading(config, tokenizer, template),
        )
    batch_plan(config, len(train_set))  # raises when the prompts do not fill a step
    benchmarks = load_benchmarks(config, tokenizer, bound, template)
    check_tokens(config, limits, train_set, benchmarks, (*bound.read_token_ids, *end_ids))
    return Inputs(
        config=config,
        device=device,
        assumed_gpus=assumed,
        tokenizer=tokenizer,
        bound=bound,
        end_ids=end_ids,
        template=template,
        judge_template=template_of_built(config.data.prompt_dataset),
        train_set=train_set,
        benchmarks=benchmarks,
        warnings=tuple(warnings),
        given=given,
    )


def load_given(
    config: Config, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, reader: ScoreReader, longest: int
) -> GivenDataset:
    """The judgements of a warm-up. longest: of a prompt in tokens, where its feedback is still to be written."""
    return GivenDataset.load(
        config.data.prompt_dataset,
        response_key=config.data.response_key,
        reader=reader,
        max_len=config.data.max_len - reader.bound.extra_tokens,
        max_prompt_tokens=longest,
        response_may_lack=config.warmup.feedback != "given",
        max_samples=config.data.max_samples,
        seed=config.train.seed,
        **_reading(config, tokenizer, template),
    )


def check_engine(config: Config, bound: BoundScale) -> ModelLimits:
    """ConfigError for settings that no engine can meet with this model; returns the limits in the model's config."""
    try:
        check_read_tokens(bound)
    except EngineSpecError as error:
        raise ConfigError(f"--real.scale {config.real.scale}, --real.anchor: {error}") from error
    try:
        limits = ModelLimits.of(config.actor.model_name_or_path)
        limits.check_length(config.data.max_len, "--data.max_len")
        limits.check_workers(config.vllm.tensor_parallel_size, "--vllm.tensor_parallel_size")
    except EngineSpecError as error:
        raise ConfigError(f"--actor.model_name_or_path {config.actor.model_name_or_path}: {error}") from error
    return limits


def check_tokens(
    config: Config,
    limits: ModelLimits,
    train_set: JudgeDataset,
    benchmarks: Sequence[Benchmark],
    own: Sequence[int],
) -> None:
    """ConfigError for tokens that the model does not have, and for prompts too short to compare engine and policy.

    own: the scale's tokens and the tokens that end a response.
    """
    try:
        limits.check_tokens(own, "the labels of --real.scale and the end of text")
        for what, prompts in (
            (f"the prompts of --data.prompt_dataset {config.data.prompt_dataset}", train_set.prompts),
            *((f"the prompts of --eval.dataset {b.source}", b.prompts) for b in benchmarks),
        ):
            limits.check_tokens((token for prompt in prompts for token in prompt.token_ids), what)
    except EngineSpecError as error:
        raise ConfigError(f"--actor.model_name_or_path {config.actor.model_name_or_path}: {error}") from error
    if not any(len(prompt.token_ids) > 1 for prompt in train_set.prompts):
        raise ConfigError(
            f"--data.prompt_dataset {config.data.prompt_dataset}: every prompt is a single token; engine and policy "
            "are compared on prompts of two tokens or more"
        )


def check_lora(config: Config) -> None:
    """ConfigError for adapters that the model cannot have; reads the model's config, not its weights."""
    lora = config.ds.lora
    if lora.rank == 0:
        return
    # Imported here: peft takes seconds to import, and a run without adapters does not need it.
    from real_openrlhf.actors.policy.lora import LoraError, check_adapters

    try:
        check_adapters(config.actor.model_name_or_path, lora)
    except (LoraError, OSError) as error:
        raise ConfigError(f"--actor.model_name_or_path {config.actor.model_name_or_path}: {error}") from error


def load_benchmarks(
    config: Config, tokenizer: PreTrainedTokenizerBase, bound: BoundScale, template: PromptTemplate
) -> tuple[Benchmark, ...]:
    """The held-out benchmarks of --eval.dataset; none without it."""
    if config.eval.dataset is None:
        return ()
    room = bound.extra_tokens
    if config.eval.force_anchor:
        reader = ScoreReader.build(bound, tokenizer, end_token_ids(config.actor.model_name_or_path, tokenizer))
        room = room_for_forcing(reader)
    return tuple(
        load_benchmark(
            name,
            source,
            group_key=None,
            max_prompt_tokens=config.data.max_len - config.rollout.max_new_tokens - room,
            max_samples=config.eval.max_samples,
            seed=config.eval.seed,
            scale=config.real.score_scale,
            **_reading(config, tokenizer, template),
        )
        for name, source in benchmark_sources(config).items()
    )


def _reading(config: Config, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> dict[str, Any]:
    """Arguments that are the same for reading training and evaluation data."""
    return dict(
        input_key=config.data.input_key,
        label_key=config.data.label_key,
        tokenizer=tokenizer,
        template=template,
        skip_bad_rows=config.data.skip_bad_rows,
    )


def known_device(config: Config) -> Device | None:
    """The device, as far as it is known before Ray starts. None: "auto" on a cluster, which decides by its own GPUs.

    If --real.device asks for GPUs: a cluster that will be joined is assumed to have them; this machine must have
    them, else DeviceError.
    """
    if config.assume_gpus is not None:
        dtype = "bf16" if config.ds.param_dtype == "auto" else config.ds.param_dtype
        return Device(name="cuda" if config.real.device != "cpu" else "cpu", dtype_name=dtype)
    joined = cluster_to_join(config.ray.address)
    if joined and config.real.device == "auto":
        return None
    return Device.resolve(config.real.device, config.ds.param_dtype, cluster_gpus=1 if joined else None)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute local paths: actors on a joined cluster run in another folder than the driver."""
    actor, ckpt = config.actor, config.ckpt
    if Path(actor.model_name_or_path).is_dir():
        actor = replace(actor, model_name_or_path=str(Path(actor.model_name_or_path).resolve()))
    if ckpt.output_dir:
        ckpt = replace(ckpt, output_dir=str(Path(ckpt.output_dir).resolve()))
    if ckpt.path:
        ckpt = replace(ckpt, path=str(Path(ckpt.path).resolve()))
    return replace(config, actor=actor, ckpt=ckpt)
