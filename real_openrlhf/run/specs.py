"""Turns flags into the settings of each part of a run. No actor, no Ray and no file is touched here."""

from __future__ import annotations

import math
from dataclasses import replace

from real_openrlhf.actors.engine.spec import EngineSpec, logprobs_mode_for
from real_openrlhf.actors.policy.spec import PolicySpec
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.objectives import make_objective
from real_openrlhf.algo.objectives.base import Objective
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.common.device import Device
from real_openrlhf.config.batch_plan import BatchPlan, resolve_ratio
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from real_openrlhf.config.sampling import evaluation_sampling, rollout_sampling
from real_openrlhf.config.schema import Config, LoraConfig
from real_openrlhf.controller.settings import ControllerSettings
from real_openrlhf.controller.warmup import WarmupSettings
from real_openrlhf.evals.evaluator import EvaluatorSpec
from real_openrlhf.evals.objective import RewardSettings
from real_openrlhf.run.inputs import Inputs
from real_openrlhf.run.placement import ROLLOUT, Request


def objective_of(config: Config, device: Device) -> Objective:
    real = config.real
    settings = {
        "lam": real.lam,
        "beta": real.beta,
        "answer_reward": real.answer_reward,
        "standardise": real.standardise,
        "clip": real.advantage_clip,
        "tolerance": device.reward_tolerance if real.tolerance is None else real.tolerance,
        "invalid_penalty": real.invalid_penalty,
        "renormalise": real.renormalise,
    }
    return make_objective(real.objective, settings)


def loss_options(config: Config) -> LossOptions:
    low, high = config.actor.clip_bounds
    advantage = config.algo.advantage
    return LossOptions(
        aggregation=config.real.aggregation,
        ratio=resolve_ratio(config),
        clip_low=low,
        clip_high=high,
        tis_cap=advantage.is_correction_threshold if advantage.is_correction_level == "token" else None,
        kl_coef=config.algo.kl.init_coef,
        kl_estimator=config.algo.kl.estimator,
        entropy_coef=config.actor.entropy_coef or 0.0,
        renormalise=config.real.renormalise,
    )


def controller_settings(config: Config, plan: BatchPlan) -> ControllerSettings:
    return ControllerSettings(
        total_steps=plan.total_steps,
        batch_size=config.rollout.batch_size,
        share_by=math.lcm(config.ranks, config.reference_ranks or 1),
        sampling=rollout_sampling(config),
        seed=config.train.seed,
        seeded=config.train.full_determinism_enable,
        keep=config.real.keep_groups,
        refill=config.real.refill,
        max_refills=config.real.max_refills,
        eval_steps=config.eval.steps,
        min_mass=config.real.min_mass,
        min_readable=config.real.min_readable,
        dead_steps=config.real.dead_steps,
        renormalise=config.real.renormalise,
        n_samples=config.logger.samples,
        logging_steps=config.logger.logging_steps,
        one_ahead=config.train.async_enable,
        eval_beside=config.eval.engine == "own",
        max_skipped=config.real.max_skipped,
    )


def warmup_settings(config: Config, plan: BatchPlan) -> WarmupSettings:
    return WarmupSettings(
        total_steps=plan.total_steps,
        batch_size=config.rollout.batch_size,
        eval_steps=config.eval.steps,
        eval_beside=not config.train.colocate_all,
        logging_steps=config.logger.logging_steps,
        max_skipped=config.real.max_skipped,
        patience=config.warmup.patience,
    )


def placement_requests(config: Config, device: Device) -> list[Request]:
    """Places of the policy, of the engines, of a reference, and of the evaluator's engine.

    Colocated, policy and engines share theirs: rank i and engine worker i run on bundle i. All bundles of an engine are
    on one node. Ranks of policy and reference lie on nodes as the flags say, where the nodes can hold that.
    """
    bundle = device.bundle()
    width = config.vllm.tensor_parallel_size
    on_one_node = width if width > 1 else None
    workers = engine_places(config, device)
    policy = Request(name="policy", bundles=(bundle,) * config.ranks, per_node=config.actor.num_gpus_per_node)
    if not config.uses_engines:
        requests = [policy]
    elif config.train.colocate_all:
        per_node = config.actor.num_gpus_per_node
        requests = [replace(workers, name="policy+rollout", per_node=None if per_node % width else per_node)]
    else:
        requests = [policy, workers]
    if config.reference_ranks:
        ranks = (bundle,) * config.reference_ranks
        requests.append(Request(name="reference", bundles=ranks, per_node=config.ref.num_gpus_per_node))
    if config.eval.dataset and config.eval.engine == "own":
        requests.append(Request(name="evaluator", bundles=(bundle,) * width, width=on_one_node))
    return requests


def engine_places(config: Config, device: Device) -> Request:
    """Bundles of the rollout engines, apart from any policy."""
    width = config.vllm.tensor_parallel_size
    return Request(
        name=ROLLOUT,
        bundles=(device.bundle(),) * (config.vllm.num_engines * width),
        width=width if width > 1 else None,
    )


def engine_spec(inputs: Inputs, device: Device) -> EngineSpec:
    config = inputs.config
    return EngineSpec(
        model=config.actor.model_name_or_path,
        device=device,
        bound=inputs.bound,
        max_model_len=config.data.max_len,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        enable_prefix_caching=config.vllm.enable_prefix_caching,
        # Without a GPU there are no graphs to capture.
        enforce_eager=config.vllm.enforce_eager or not device.is_cuda,
        gpu_memory_utilization=config.engine_utilisation,
        seed=config.train.seed,
        enable_sleep=config.vllm.enable_sleep,
        max_num_seqs=config.vllm.max_num_seqs,
        max_num_batched_tokens=config.vllm.max_num_batched_tokens,
        fp32_head=config.vllm.fp32_head,
        logprobs_mode=logprobs_mode_for(config.rollout.temperature, config.rollout.top_p),
    )


def policy_spec(inputs: Inputs, plan: BatchPlan, device: Device) -> PolicySpec:
    config = inputs.config
    return PolicySpec(
        path=config.actor.model_name_or_path,
        args=to_openrlhf_args(
            config,
            device_dtype=device.dtype_name,
            attn=config.ds.attn_implementation,
            sync_backend=device.dist_backend,
        ),
        device=device,
        attn_implementation=config.ds.attn_implementation,
        ranks_per_node=config.actor.num_gpus_per_node,
        values=config.real.score_scale.values,
        options=loss_options(config),
        trains_score_token=objective_of(config, device).trains_score_token,
        term_grad_norm_steps=config.logger.term_grad_norm_steps,
        norms_at_parameters=config.logger.term_grad_norm_at == "parameters",
        max_steps=max(1, plan.total_updates),
        bucket_bytes=config.sync.bucket_mb * 2**20,
        logits_mb=config.real.logits_mb,
        lora=config.ds.lora,
        seed=config.train.seed,
        text=inputs.train_set.prompts[0].token_ids if inputs.train_set.prompts else (),
    )


def reference_spec(policy: PolicySpec, config: Config) -> PolicySpec:
    """The policy's own settings, on the reference group's ranks."""
    return replace(policy, ranks_per_node=config.ref.num_gpus_per_node, lora=LoraConfig())


def evaluator_engine(engine: EngineSpec, config: Config) -> EngineSpec | None:
    """The evaluator's own engine, which judges while the others sample; it never sleeps. None: it has none."""
    own = config.eval.dataset is not None and config.eval.engine == "own"
    return replace(engine, enable_sleep=False) if own else None


def evaluator_spec(inputs: Inputs) -> EvaluatorSpec:
    config = inputs.config
    return EvaluatorSpec(
        benchmarks=inputs.benchmarks,
        reader=ScoreReader.build(inputs.bound, inputs.tokenizer, inputs.end_ids),
        sampling=evaluation_sampling(config),
        renormalise=config.real.renormalise,
        reward=RewardSettings(
            lam=config.real.lam,
            answer_reward=config.real.answer_reward,
            invalid_penalty=config.real.invalid_penalty,
            renormalise=config.real.renormalise,
        ),
        output_dir=config.ckpt.output_dir,
        force=config.eval.force_anchor,
        n_samples=config.logger.samples,
        plots=config.logger.wandb.mode != "disabled",
    )


def probe_sequences(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """Token sequences on which engine and policy are compared after a sync: the ends of the first prompts.

    Ends, because prompts often begin with the same template.
    """
    sync = inputs.config.sync
    # A token's log-prob needs a token before it, so prompts of one token are skipped.
    prompts = [p for p in inputs.train_set.prompts if len(p.token_ids) > 1][: sync.check_sequences]
    return tuple(tuple(p.token_ids[-sync.check_tokens :]) for p in prompts)


def engine_workers(config: Config) -> int:
    own = 1 if config.eval.dataset and config.eval.engine == "own" else 0
    if not config.uses_engines:
        return 0
    return (config.vllm.num_engines + own) * config.vllm.tensor_parallel_size
