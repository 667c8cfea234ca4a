"""From checked inputs to a running controller: the only module that knows all the parts."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from real_openrlhf.actors.device import Device
from real_openrlhf.actors.engine_spec import EngineSpec, EngineSpecError, check_sampling, logprobs_mode_for
from real_openrlhf.actors.placement import Request, reserve
from real_openrlhf.actors.protocols import Sampling
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.objectives import Objective, RealObjective
from real_openrlhf.config.cli import config_to_dict
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.plan import BatchPlan, batch_plan, render_plan, resolve_ratio
from real_openrlhf.config.schema import Config
from real_openrlhf.controller.progress import PhaseTimer, Progress
from real_openrlhf.controller.run_log import RunLog, WandbSettings
from real_openrlhf.controller.trainer import Controller, ControllerSettings
from real_openrlhf.data.stream import PromptStream
from real_openrlhf.export import CardInfo, check_export, write_model_card
from real_openrlhf.judge_settings import JudgeSettings
from real_openrlhf.ray_session import Session, cluster_to_join, passed_environment, ray_session

if TYPE_CHECKING:
    from real_openrlhf.actors.evaluator import EvaluatorSpec
    from real_openrlhf.actors.policy_actor import PolicySpec
    from real_openrlhf.actors.remote import RayPolicyGroup, RayRolloutGroup
    from real_openrlhf.train_real import Inputs

logger = logging.getLogger(__name__)


def describe(inputs: Inputs) -> str:
    """The resolved plan, as --dry_run prints it. Starts nothing."""
    config = inputs.config
    # A cluster's GPUs are not known before it is joined: a wish for them is believed.
    believed = 1 if config.real.device == "cuda" and cluster_to_join(config.ray.address) else None
    device = Device.resolve(config.real.device, config.ds.param_dtype, cluster_gpus=believed)
    plan = batch_plan(config, len(inputs.train_set))
    return render_plan(
        config,
        plan,
        inputs.bound,
        [str(request) for request in placement_requests(config, device)],
        device=device.name,
        dtype=device.dtype_name,
        decode=lambda token: inputs.tokenizer.decode([token]),
        warnings=inputs.warnings,
    )


def launch(inputs: Inputs) -> dict[str, Any]:
    """Start, train, export, end. Returns the metrics of the last evaluation."""
    config = inputs.config
    for warning in inputs.warnings:
        logger.warning("%s", warning)
    plan = batch_plan(config, len(inputs.train_set))
    with (
        RunLog(
            config.ckpt.output_dir,
            tensorboard_dir=config.logger.tensorboard_dir,
            wandb=_wandb(config),
            config=config_to_dict(config),
        ) as log,
        ray_session(
            config.ray.address,
            num_cpus=config.ray.num_cpus,
            needed_cpus=float(config.ranks + _engine_workers(config)),
        ) as session,
    ):
        device = _device(config, session)
        logger.info("%s", render_start(inputs, plan, device))
        timer = PhaseTimer()
        with timer.phase("start"):
            actors = _Actors(inputs, plan, device)
        log.log(0, "sync", {"seconds/start": timer.seconds("start"), **actors.facts})
        with Progress(plan.total_steps, enabled=config.logger.progress) as progress:
            controller = Controller(
                controller_settings(config, plan),
                scale=config.real.score_scale,
                objective=make_objective(config),
                prompts=PromptStream(
                    inputs.train_set.prompts, seed=config.train.seed, num_episodes=config.train.num_episodes
                ),
                rollouts=actors.rollouts,
                policy=actors.policy,
                weight_sync=actors.weight_sync,
                evaluator=actors.evaluator,
                log=log,
                progress=progress,
                decode=inputs.tokenizer.decode,
            )
            metrics = controller.fit()
        _export(inputs, controller.step_number, metrics)
        actors.shutdown()
    return metrics


def render_start(inputs: Inputs, plan: BatchPlan, device: Device) -> str:
    """What the run is about to do, in a few lines of the log."""
    return render_plan(
        inputs.config,
        plan,
        inputs.bound,
        [str(request) for request in placement_requests(inputs.config, device)],
        device=device.name,
        dtype=device.dtype_name,
        warnings=(),
    )


def make_objective(config: Config) -> Objective:
    real = config.real
    return RealObjective(
        lam=real.lam,
        beta=real.beta,
        answer_reward=real.answer_reward,
        standardise=real.standardise,
        clip=real.advantage_clip,
        tolerance=real.tolerance,
        invalid_penalty=real.invalid_penalty,
        renormalise=real.renormalise,
    )


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


def rollout_sampling(config: Config) -> Sampling:
    return Sampling(
        n=config.rollout.n_samples_per_prompt,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def evaluation_sampling(config: Config) -> Sampling:
    return Sampling(
        n=config.eval.n_samples_per_prompt,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.eval.seed,
    )


def check_samplings(config: Config) -> None:
    """ConfigError for rollouts or evaluation that draw from another distribution than the engines give log-probs of."""
    try:
        mode = logprobs_mode_for(config.rollout.temperature, config.rollout.top_p)
        check_sampling(rollout_sampling(config), mode)
    except EngineSpecError as error:
        raise ConfigError(f"--rollout.temperature, --rollout.top_p: {error}") from error
    if config.eval.dataset is None:
        return
    try:
        check_sampling(evaluation_sampling(config), mode)
    except EngineSpecError as error:
        raise ConfigError(
            f"--eval.temperature {config.eval.temperature:g} with --eval.top_p {config.eval.top_p:g} does not go "
            f"together with --rollout.temperature {config.rollout.temperature:g}: {error}"
        ) from error


def controller_settings(config: Config, plan: BatchPlan) -> ControllerSettings:
    return ControllerSettings(
        total_steps=plan.total_steps,
        batch_size=config.rollout.batch_size,
        ranks=config.ranks,
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
        output_dir=str(model_folder(config)),
    )


def model_folder(config: Config) -> Path:
    return Path(config.ckpt.output_dir) / "model"


def placement_requests(config: Config, device: Device) -> list[Request]:
    """One placement group for the policy, one for the engines, one for the evaluator's own engine."""
    bundle = device.bundle()
    width = config.vllm.tensor_parallel_size
    requests = [
        Request(name="policy", bundles=(bundle,) * config.ranks),
        Request(name="rollout", bundles=(bundle,) * (config.vllm.num_engines * width)),
    ]
    if config.eval.dataset and config.eval.engine == "own":
        requests.append(Request(name="evaluator", bundles=(bundle,) * width))
    return requests


class _Actors:
    """All actors of a run, started side by side."""

    def __init__(self, inputs: Inputs, plan: BatchPlan, device: Device) -> None:
        from real_openrlhf.actors.remote import RayEvaluator, RayPolicyGroup, RayRolloutGroup, RayWeightSync

        config = inputs.config
        env = passed_environment()
        groups = reserve(placement_requests(config, device), config.ray.placement_timeout)
        spec = engine_spec(inputs, device)
        self.rollouts: RayRolloutGroup = RayRolloutGroup(
            spec, n_engines=config.vllm.num_engines, group=groups["rollout"], device=device, env=env
        )
        engines = [self.rollouts]
        if "evaluator" in groups:
            engines.append(RayRolloutGroup(spec, n_engines=1, group=groups["evaluator"], device=device, env=env))
        self.policy: RayPolicyGroup = RayPolicyGroup(
            policy_spec(inputs, plan, device), n_ranks=config.ranks, group=groups["policy"], device=device, env=env
        )
        waiting = [ref for group in engines for ref in group.ready()]
        built = ray.get([*self.policy.ready(), *waiting])
        self.facts = {name: value for name, value in built[0].items() if isinstance(value, int | float)}
        logger.info("policy: %s; engines: %d", built[0], len(waiting))
        self._engines = engines
        self.weight_sync = RayWeightSync(
            self.policy,
            engines,
            probes=probe_sequences(inputs),
            deadline_s=config.sync.deadline,
            max_mean_difference=config.sync.max_mean_difference or device.sync_tolerance,
            device=device,
        )
        self.evaluator = None
        if inputs.eval_set is not None:
            self.evaluator = RayEvaluator(evaluator_spec(inputs), engines[-1], env=env)

    def shutdown(self) -> None:
        for group in self._engines:
            group.shutdown()


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
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        seed=config.train.seed,
        logprobs_mode=logprobs_mode_for(config.rollout.temperature, config.rollout.top_p),
    )


def policy_spec(inputs: Inputs, plan: BatchPlan, device: Device) -> PolicySpec:
    from real_openrlhf.actors.policy_actor import PolicySpec
    from real_openrlhf.config.openrlhf_args import to_openrlhf_args

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
        trains_score_token=make_objective(config).trains_score_token,
        term_grad_norm_steps=config.logger.term_grad_norm_steps,
        max_steps=max(1, plan.total_updates),
        bucket_bytes=config.sync.bucket_mb * 2**20,
    )


def evaluator_spec(inputs: Inputs) -> EvaluatorSpec:
    from real_openrlhf.actors.evaluator import EvaluatorSpec

    config = inputs.config
    assert inputs.eval_set is not None
    return EvaluatorSpec(
        prompts=inputs.eval_set.prompts,
        scale=config.real.score_scale,
        sampling=evaluation_sampling(config),
        renormalise=config.real.renormalise,
        output_dir=config.ckpt.output_dir,
    )


def probe_sequences(inputs: Inputs) -> list[list[int]]:
    """What engine and policy are compared on after a sync: the ends of the first prompts.

    The end of a prompt differs from row to row, its beginning is often a template.
    """
    sync = inputs.config.sync
    return [list(p.token_ids[-sync.check_tokens :]) for p in inputs.train_set.prompts[: sync.check_sequences]]


def _device(config: Config, session: Session) -> Device:
    return Device.resolve(config.real.device, config.ds.param_dtype, cluster_gpus=math.floor(session.gpus))


def _engine_workers(config: Config) -> int:
    own = 1 if config.eval.dataset and config.eval.engine == "own" else 0
    return (config.vllm.num_engines + own) * config.vllm.tensor_parallel_size


def _wandb(config: Config) -> WandbSettings:
    w = config.logger.wandb
    return WandbSettings(mode=w.mode, project=w.project, run_name=w.run_name, group=w.group, org=w.org, key=w.key)


def _export(inputs: Inputs, steps: int, metrics: dict[str, float | None]) -> None:
    """Model card and judge settings beside the weights, then a check of the whole folder."""
    config = inputs.config
    folder = model_folder(config)
    settings = JudgeSettings(
        scale=config.real.score_scale,
        anchors=config.real.anchor,
        end_ids=tuple(sorted(inputs.end_ids)),
        max_new_tokens=config.rollout.max_new_tokens,
        template=inputs.template,
        temperature=config.rollout.temperature,
        renormalise=config.real.renormalise,
        preset=config.real.preset,
    )
    info = CardInfo(
        title=Path(config.ckpt.output_dir).resolve().name,
        base_model=config.actor.model_name_or_path,
        settings=settings,
        data_source=config.data.prompt_dataset,
        data_rows=len(inputs.train_set),
        data_hash=inputs.train_set.sha256,
        objective=config.real.objective,
        objective_settings={
            "lambda": config.real.lam,
            "beta": config.real.beta,
            "answer reward": config.real.answer_reward,
            "Term 1 aggregation": config.real.aggregation,
        },
        steps=steps,
        training={
            "learning rate": config.actor.adam.lr,
            "rollouts per prompt": config.rollout.n_samples_per_prompt,
            "prompts per step": config.rollout.batch_size,
            "groups kept": config.real.keep_groups,
            "differs from the preset in": ", ".join(config.overridden) or "nothing",
        },
        evaluation=split_metrics(metrics) if metrics else None,
        evaluation_data=config.eval.dataset,
    )
    write_model_card(folder, info=info)
    check_export(folder)


def split_metrics(metrics: dict[str, float | None]) -> dict[str, dict[str, float | None]]:
    """ "expected/pearson" -> column "expected", row "pearson"."""
    columns: dict[str, dict[str, float | None]] = {}
    for name, value in metrics.items():
        column, slash, row = name.partition("/")
        columns.setdefault(column if slash else "all", {})[row if slash else name] = value
    return columns
