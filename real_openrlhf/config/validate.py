"""Finds contradictions between flags, before anything starts."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Literal

from real_openrlhf.algo.objectives import objective_class
from real_openrlhf.config.batch_plan import resolve_ratio
from real_openrlhf.config.convert import flags_by_name, get_value
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.presets import WARMUP, preset_values
from real_openrlhf.config.schema import Config, LoraConfig
from real_openrlhf.config.supervised import is_read

__all__ = ["ConfigError", "validate"]


def validate(config: Config, *, device: Literal["cpu", "cuda"] | None = None) -> list[str]:
    """Raise ConfigError for flags that contradict each other; return warnings.

    device: the device of the run, if known; else --real.device counts, and with "auto" the checks
    that depend on the device are left out.
    """
    for name, item in flags_by_name().items():
        if item.required and not get_value(config, name):
            raise ConfigError(f"--{name} is required: {item.help}")
    if config.assume_gpus is not None and not config.dry_run:
        raise ConfigError("--assume_gpus plans for GPUs that are not here; add --dry_run")
    if not config.ckpt.output_dir and not config.dry_run:
        raise ConfigError("--ckpt.output_dir is required: the folder of the trained model and logs")
    if device is None and config.real.device != "auto":
        device = config.real.device
    warnings: list[str] = []
    for check in (
        _command,
        _batch,
        _sampling,
        _groups,
        _off_policy,
        _one_ahead,
        _colocated,
        _reference,
        _optimizer,
        _lora,
        _deepspeed,
        _lengths,
        _engines,
        _evaluation,
        _objective,  # the last: it may import torch, which takes seconds
    ):
        warnings += check(config)
    if device is not None:
        warnings += _device(config, device)
    return warnings


def _command(config: Config) -> list[str]:
    """Flags of train_warmup in train_real, and the other way round."""
    preset, known = preset_values(config.real.preset), flags_by_name()
    if config.supervised != (config.real.preset == WARMUP):
        method = f" --warmup.method {config.real.objective}" if config.supervised else ""
        what = f"--real.objective {config.real.objective}" if config.supervised else f"--real.preset {WARMUP}"
        raise ConfigError(f"{what} learns given responses; use python -m real_openrlhf.train_warmup{method}")
    derived = {"real.preset", "real.objective", "rollout.batch_size"} if config.supervised else set()
    for name, item in known.items():
        given = get_value(config, name) != preset.get(name, item.default)
        if given and name not in derived and not is_read(name, config.supervised):
            command, other = ("train_warmup", "train_real") if config.supervised else ("train_real", "train_warmup")
            raise ConfigError(f"--{name}: {command} does not read it, it is a flag of {other}; leave it out")
    return []


def _batch(config: Config) -> list[str]:
    samples, ranks = config.samples_per_step, config.ranks
    prompts, k, update = config.rollout.batch_size, config.rollout.n_samples_per_prompt, config.train.batch_size
    what = f"{prompts} prompts x {k} rollouts = {samples} rollouts per step"
    if prompts % ranks:
        name = "train" if config.supervised else "rollout"
        raise ConfigError(
            f"--{name}.batch_size {prompts} must be a multiple of the {ranks} policy ranks "
            f"(--actor.num_nodes {config.actor.num_nodes} x --actor.num_gpus_per_node {config.actor.num_gpus_per_node})"
        )
    if update is None and samples % config.real.mini_batches:
        raise ConfigError(f"--real.mini_batches {config.real.mini_batches} must divide {what}")
    if update is not None and samples % update:
        raise ConfigError(f"--train.batch_size {update} must divide {what} (--rollout.*)")
    if config.samples_per_update % ranks:
        raise ConfigError(
            f"the {config.samples_per_update} rollouts of an update (--train.batch_size, --real.mini_batches) must be "
            f"a multiple of the {ranks} policy ranks"
        )
    return []


def _sampling(config: Config) -> list[str]:
    if config.rollout.n_samples_per_prompt < 2 and not config.supervised:
        raise ConfigError(
            "--rollout.n_samples_per_prompt must be at least 2: advantages compare rollouts of one prompt"
        )
    if config.rollout.top_p >= 1:
        return []
    if config.rollout.temperature != 1:
        raise ConfigError(
            f"--rollout.top_p {config.rollout.top_p:g} needs --rollout.temperature 1, got "
            f"{config.rollout.temperature:g}: only raw log-probs are over the full vocabulary"
        )
    if config.corrects_importance:
        raise ConfigError(
            f"--rollout.top_p {config.rollout.top_p:g} forbids --algo.advantage.is_correction_level "
            f"{config.algo.advantage.is_correction_level}: log-probs are not those of the sampler"
        )
    return [
        f"--rollout.top_p {config.rollout.top_p:g}: log-probs are over the full vocabulary, not the nucleus that is "
        "sampled from, so gradients are biased"
    ]


# Setting of an objective -> its flag. renormalise is not here, since evaluation uses it too.
OBJECTIVE_FLAGS = {
    "lam": "real.lam",
    "beta": "real.beta",
    "answer_reward": "real.answer_reward",
    "standardise": "real.standardise",
    "clip": "real.advantage_clip",
    "tolerance": "real.tolerance",
    "invalid_penalty": "real.invalid_penalty",
}


def _objective(config: Config) -> list[str]:
    preset, known = preset_values(config.real.preset), flags_by_name()
    changed = {
        setting: name
        for setting, name in OBJECTIVE_FLAGS.items()
        if get_value(config, name) != preset.get(name, known[name].default)
    }
    if not changed:
        return []
    read = {field.name for field in fields(objective_class(config.real.objective))}
    for setting, name in changed.items():
        if setting not in read:
            flags = (
                ", ".join(f"--{flag}" for one, flag in OBJECTIVE_FLAGS.items() if one in read) or "no flag of this kind"
            )
            raise ConfigError(
                f"--{name}: the objective {config.real.objective} does not read it; leave it out. It reads {flags}"
            )
    return []


def _groups(config: Config) -> list[str]:
    real = config.real
    if real.refill and not real.filters_groups:
        raise ConfigError("--real.refill needs dynamic sampling, but --real.keep_groups is all: nothing is dropped")
    if real.refill and real.max_refills == 0:
        raise ConfigError("--real.refill with --real.max_refills 0 can never refill; use --no-real.refill")
    return []


def _off_policy(config: Config) -> list[str]:
    ratio = resolve_ratio(config)
    if ratio == "clip" and config.corrects_importance:
        return [
            "--algo.advantage.is_correction_level has no effect with the clipped ratio, which compares with the "
            "engines' log-probs already"
        ]
    if ratio == "none":
        return ["--real.ratio none: several updates per batch without an off-policy correction"]
    return []


def _reference(config: Config) -> list[str]:
    ranks, prompts = config.reference_ranks, config.rollout.batch_size
    if not ranks:
        return []
    if prompts % ranks:
        raise ConfigError(
            f"--rollout.batch_size {prompts} must be a multiple of the {ranks} reference ranks "
            f"(--ref.num_nodes {config.ref.num_nodes} x --ref.num_gpus_per_node {config.ref.num_gpus_per_node})"
        )
    if config.ref.offload and config.ds.zero_stage != 3:
        raise ConfigError(
            f"--ref.offload needs --ds.zero_stage 3, got {config.ds.zero_stage}: DeepSpeed moves weights to the CPU "
            "in shards only"
        )
    return []


def _lora(config: Config) -> list[str]:
    lora = config.ds.lora
    if lora.rank == 0:
        if lora != LoraConfig():
            raise ConfigError("--ds.lora.* needs --ds.lora.rank above 0; at 0 all parameters are trained")
        return []
    if "all-linear" in lora.target_modules and len(lora.target_modules) > 1:
        raise ConfigError("--ds.lora.target_modules all-linear means all of them; give no other name with it")
    if lora.dropout > 0:
        return [
            f"--ds.lora.dropout {lora.dropout:g}: the policy trains with log-probs of another network than the one "
            "that sampled, so updates are not quite on-policy"
        ]
    return []


def _one_ahead(config: Config) -> list[str]:
    if not config.train.async_enable:
        return []
    if config.real.ratio == "none" and not config.corrects_importance:
        raise ConfigError(
            "--train.async_enable trains on rollouts of weights that are one version old, and --real.ratio none leaves "
            "that uncorrected; use --real.ratio auto or clip, or --algo.advantage.is_correction_level token"
        )
    if config.train.full_determinism_enable:
        return [
            "--train.async_enable: a checkpoint does not hold the batch that was sampled ahead. A resumed run samples "
            "it again by newer weights, so it is not bitwise an unbroken one (--train.full_determinism_enable)"
        ]
    return []


def _colocated(config: Config) -> list[str]:
    if not config.train.colocate_all:
        for name, on in (("vllm.enable_sleep", config.vllm.enable_sleep), ("ds.enable_sleep", config.ds.enable_sleep)):
            if on:
                raise ConfigError(
                    f"--{name} frees memory for others on the same GPU, but there are none; add --train.colocate_all"
                )
        if config.sync.backend == "ipc":
            raise ConfigError(
                "--sync.backend ipc sends weights inside a GPU, which policy and engines must share; use auto, or "
                "add --train.colocate_all"
            )
        return []
    if config.train.async_enable:
        raise ConfigError(
            "--train.async_enable samples while the policy trains, --train.colocate_all lets them take turns on the "
            "same GPUs; drop one of them"
        )
    if config.sync.backend == "nccl":
        raise ConfigError("--sync.backend nccl: NCCL refuses two processes on one GPU (--train.colocate_all); use auto")
    share, limit = config.engine_utilisation, config.colocated_utilisation
    if share > limit:
        more = "" if limit > 0.5 else ", or take turns: --vllm.enable_sleep and --ds.enable_sleep, up to 0.75"
        raise ConfigError(
            f"--vllm.gpu_memory_utilization {share:g} leaves the policy on the same GPUs (--train.colocate_all) too "
            f"little; use at most {limit:g}{more}"
        )
    workers = config.vllm.num_engines * config.vllm.tensor_parallel_size
    if workers != config.ranks:
        raise ConfigError(
            f"--train.colocate_all puts one engine worker on the GPU of each policy rank, but --vllm.num_engines "
            f"{config.vllm.num_engines} x --vllm.tensor_parallel_size {config.vllm.tensor_parallel_size} = {workers} "
            f"workers and --actor.num_nodes {config.actor.num_nodes} x --actor.num_gpus_per_node "
            f"{config.actor.num_gpus_per_node} = {config.ranks} ranks"
        )
    if config.ds.enable_sleep and config.ds.zero_stage == 0:
        raise ConfigError("--ds.enable_sleep moves ZeRO's optimizer states; it needs --ds.zero_stage 1, 2 or 3")
    return []


def _optimizer(config: Config) -> list[str]:
    actor = config.actor
    if actor.lr_scheduler == "constant" and actor.lr_warmup_ratio > 0:
        raise ConfigError(
            f"--actor.lr_scheduler constant has no warm-up, but --actor.lr_warmup_ratio is {actor.lr_warmup_ratio:g}; "
            "use constant_with_warmup"
        )
    if actor.gradient_checkpointing_reentrant and not actor.gradient_checkpointing_enable:
        raise ConfigError("--actor.gradient_checkpointing_reentrant needs --actor.gradient_checkpointing_enable")
    if actor.adam.lr == 0:
        return ["--actor.adam.lr 0: nothing is learned"]
    return []


def _deepspeed(config: Config) -> list[str]:
    ds = config.ds
    if ds.adam_offload and ds.zero_stage == 0:
        raise ConfigError("--ds.adam_offload needs --ds.zero_stage 1, 2 or 3")
    if ds.zpg > 1 and ds.zero_stage != 3:
        raise ConfigError(f"--ds.zpg {ds.zpg} needs --ds.zero_stage 3, got {ds.zero_stage}")
    if config.ranks % ds.zpg:
        raise ConfigError(f"--ds.zpg {ds.zpg} must divide the {config.ranks} policy ranks")
    if ds.param_dtype == "fp32" and "flash_attention" in ds.attn_implementation:
        raise ConfigError(f"--ds.attn_implementation {ds.attn_implementation} cannot run in --ds.param_dtype fp32")
    if config.logger.term_grad_norm_at == "parameters":
        if ds.zero_stage == 3:
            raise ConfigError(
                "--logger.term_grad_norm_at parameters needs complete parameters on every rank, but --ds.zero_stage 3 "
                "shards them; use logits, or a lower stage"
            )
        if config.actor.gradient_checkpointing_reentrant:
            raise ConfigError(
                "--logger.term_grad_norm_at parameters needs two gradients of one forward pass, which torch refuses "
                "with --actor.gradient_checkpointing_reentrant; drop that flag, or use logits"
            )
    return []


def _lengths(config: Config) -> list[str]:
    if config.data.max_len <= config.rollout.max_new_tokens:
        raise ConfigError(
            f"--data.max_len {config.data.max_len} (prompt and response) must be larger than --rollout.max_new_tokens "
            f"{config.rollout.max_new_tokens}, or no prompt fits"
        )
    if config.train.max_tokens_per_gpu < config.data.max_len:
        raise ConfigError(
            f"--train.max_tokens_per_gpu {config.train.max_tokens_per_gpu} must be at least --data.max_len "
            f"{config.data.max_len}: a rollout cannot be divided"
        )
    if config.data.enable_thinking is not None and not config.data.apply_chat_template:
        raise ConfigError("--data.enable_thinking is passed to the chat template; add --data.apply_chat_template")
    if config.data.input_template is not None and "\\n" in config.data.input_template:
        return ["--data.input_template holds a backslash and an n, not a line break; in bash write $'...\\n...'"]
    return []


def _engines(config: Config) -> list[str]:
    sequences, tokens = config.vllm.max_num_seqs, config.vllm.max_num_batched_tokens
    if sequences and tokens and tokens < sequences:
        raise ConfigError(
            f"--vllm.max_num_batched_tokens {tokens} must be at least --vllm.max_num_seqs {sequences}: a pass of an "
            "engine holds one token of every rollout"
        )
    return []


def _evaluation(config: Config) -> list[str]:
    evaluates = config.eval.dataset is not None and config.eval.steps > 0 and config.ckpt.best_metric is not None
    if config.warmup.patience is not None and not evaluates:
        raise ConfigError(
            "--warmup.patience counts evaluations without a better judge: it needs --eval.dataset, --eval.steps above "
            "0 and --ckpt.best_metric_key"
        )
    if config.eval.dataset is None:
        if config.eval.engine == "own":
            raise ConfigError("--eval.engine own starts an engine for evaluation, but --eval.dataset is not given")
        return ["--eval.dataset is not given: there is no evaluation"]
    return []


def _device(config: Config, device: str) -> list[str]:
    if device == "cuda":
        if config.ds.param_dtype == "fp32":
            return ["--ds.param_dtype fp32 on GPUs: twice the memory and several times the time of bf16"]
        return _products(config)
    if config.train.colocate_all:
        raise ConfigError(
            "--train.colocate_all needs GPUs: on a CPU there is no GPU memory to share, and vLLM has no sleep mode"
        )
    if config.sync.backend in ("ipc", "nccl"):
        raise ConfigError(f"--sync.backend {config.sync.backend} needs GPUs; on a CPU use auto, gloo or shared_memory")
    if config.vllm.tensor_parallel_size > 1:
        raise ConfigError(f"--vllm.tensor_parallel_size {config.vllm.tensor_parallel_size} needs GPUs")
    if "flash_attention" in config.ds.attn_implementation:
        raise ConfigError(f"--ds.attn_implementation {config.ds.attn_implementation} needs GPUs; use sdpa or auto")
    if config.ds.use_liger_kernel:
        raise ConfigError("--ds.use_liger_kernel needs GPUs: Liger's kernels are written in Triton")
    tokens = config.vllm.max_num_batched_tokens
    if tokens and tokens < config.data.max_len:
        raise ConfigError(
            f"--vllm.max_num_batched_tokens {tokens} must be at least --data.max_len {config.data.max_len} on a CPU, "
            "where engines cannot cut a prompt into chunks"
        )
    warnings = _products(config) if config.ds.param_dtype == "bf16" else []
    if config.ds.param_dtype == "bf16":
        warnings.append("--ds.param_dtype bf16 on a CPU: about 10 times slower than fp32 unless it has AVX512-BF16")
    if config.ds.adam_offload:
        warnings.append(
            "--ds.adam_offload on a CPU: the optimizer is in CPU memory anyway; DeepSpeed compiles its CPU Adam once, "
            "for some minutes"
        )
    if config.ref.offload and config.reference_ranks:
        warnings.append("--ref.offload on a CPU: the reference is in CPU memory anyway")
    return warnings


# Standard deviation of the difference between a token's log-prob in trainer and in engine, in bf16 with the same
# weights: 0.03 to 0.05 on average were measured (common/device.py).
_BF16_TOKEN_NOISE = 0.05


def _products(config: Config) -> list[str]:
    """A warning for importance weights of whole responses in bf16, whose rounding errors add up over the tokens."""
    on_term_2 = config.corrects_importance and resolve_ratio(config) != "clip" and config.real.beta > 0
    # For independent errors; correlated ones would add up faster.
    noise = _BF16_TOKEN_NOISE * math.sqrt(config.rollout.max_new_tokens)
    if not on_term_2 or noise < 0.5:
        return []
    return [
        f"--algo.advantage.is_correction_level {config.algo.advantage.is_correction_level} in bf16: the weight of "
        f"Term 2 is a product over up to {config.rollout.max_new_tokens} tokens. Rounding alone changes its "
        f"logarithm by about {noise:.1f}, so it is mostly noise; use --real.ratio clip, which leaves Term 2 "
        "unweighted, or --real.beta 0"
    ]
