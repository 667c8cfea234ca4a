"""From checked inputs to a running controller: the only module that knows all the parts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from real_openrlhf.actors.cards import Card, local_cards
from real_openrlhf.actors.device import Device
from real_openrlhf.actors.placement import COLOCATED_SHARE, reserve
from real_openrlhf.checkpoint.signals import StopRequest
from real_openrlhf.checkpoint.store import Checkpoint, CheckpointStore
from real_openrlhf.config.cli import config_to_dict
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.memory import memory_problem
from real_openrlhf.config.plan import BatchPlan, batch_plan, render_plan
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.controller.checkpointing import Checkpointer, make_store
from real_openrlhf.controller.guards import Guards
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.progress import PhaseTimer, Progress
from real_openrlhf.controller.run_log import RunLog, WandbSettings
from real_openrlhf.controller.trainer import Controller
from real_openrlhf.data.stream import PromptStream
from real_openrlhf.export import CardInfo, check_export, write_model_card
from real_openrlhf.judge_settings import ExportError, JudgeSettings
from real_openrlhf.ray_session import Session, cluster_to_join, passed_environment, ray_session
from real_openrlhf.resume import run_identity
from real_openrlhf.wiring import (
    controller_settings,
    engine_spec,
    engine_workers,
    evaluator_spec,
    make_objective,
    model_folder,
    placement_requests,
    policy_spec,
    probe_sequences,
    reference_spec,
)

if TYPE_CHECKING:
    from real_openrlhf.actors.protocols import ReferenceGroup
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
        reward_tolerance=device.reward_tolerance,
        decode=lambda token: inputs.tokenizer.decode([token]),
        warnings=[*inputs.warnings, *check_memory(config, local_cards())],
    )


def launch(inputs: Inputs, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Start, train, export, end. Returns the metrics of the last evaluation; raises Stopped after a signal.

    checkpoint: resume from there.
    """
    config = inputs.config
    for warning in (*inputs.warnings, *check_memory(config, local_cards())):
        logger.warning("%s", warning)
    plan = batch_plan(config, len(inputs.train_set))
    store = make_store(config.ckpt.folder, keep=config.ckpt.max_num, metric=config.ckpt.best_metric)
    with (
        RunLog(
            config.ckpt.output_dir,
            tensorboard_dir=config.logger.tensorboard_dir,
            wandb=_wandb(config),
            config=config_to_dict(config),
            append=checkpoint is not None,
            # The folder was looked at before anything started (resume.check_folders).
            overwrite=checkpoint is None,
            resume_step=None if checkpoint is None else checkpoint.step,
        ) as log,
        ray_session(
            config.ray.address,
            num_cpus=config.ray.num_cpus,
            needed_cpus=float(config.ranks + config.reference_ranks + engine_workers(config)),
        ) as session,
        # Inside: ray.init installs a SIGTERM handler of its own.
        StopRequest() as stop,
    ):
        device = _device(inputs, session)
        logger.info("%s", render_start(inputs, plan, device))
        timer = PhaseTimer()
        with timer.phase("start"):
            actors = _Actors(inputs, plan, device)
            # Also without --ckpt.save_steps: a signal saves all the same.
            store.check_shared(actors.policy.sees)
        if checkpoint is None:
            log.log(0, "sync", {"seconds/start": timer.seconds("start"), **actors.facts})
        initial = 0 if checkpoint is None else checkpoint.step
        with Progress(plan.total_steps, initial=initial, enabled=config.logger.progress) as progress:
            controller = make_controller(inputs, plan, actors, log, progress, stop)
            saver = make_checkpointer(inputs, controller, actors, store)
            controller.saver = saver
            if checkpoint is not None:
                saver.load(checkpoint)
            metrics = controller.fit()
        actors.shutdown()
    return metrics


def check_memory(config: Config, cards: Sequence[Card]) -> list[str]:
    """ConfigError for a model that cannot fit into GPUs like this machine's; a warning where a cluster has others.

    Nothing without GPUs here, as on a head node.
    """
    if config.real.device == "cpu" or not cards or torch.version.cuda is None:
        return []
    parameters = count_parameters(config.actor.model_name_or_path)
    if parameters is None:
        return []
    weight_bytes = 4 if config.ds.param_dtype == "fp32" else 2
    problem = memory_problem(config, parameters, weight_bytes, max(card.memory for card in cards))
    if problem is None:
        return []
    if cluster_to_join(config.ray.address):
        return [f"if the cluster's GPUs are like this machine's: {problem}"]
    raise ConfigError(problem)


def count_parameters(path: str) -> int | None:
    """Of the model by its config, a tied head once, no weights read; None if that is not known here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError):
        return None  # what is wrong with it, the policy's own loading says
    return sum(p.numel() for p in network.parameters())


def make_controller(
    inputs: Inputs, plan: BatchPlan, actors: _Actors, log: RunLog, progress: Progress, stop: StopRequest
) -> Controller:
    config = inputs.config
    values = config.real.score_scale.values
    export = JudgeExport(
        actors.policy,
        model_folder(config),
        metric=config.ckpt.best_metric if inputs.benchmarks else None,
        describe=lambda folder: _complete_export(inputs, export, folder),
        step_of=exported_step,
    )
    actors.policy.complete_export = export.describe
    return Controller(
        controller_settings(config, plan),
        scale=config.real.score_scale,
        objective=make_objective(config, actors.device),
        prompts=PromptStream(inputs.train_set.prompts, seed=config.train.seed, num_episodes=config.train.num_episodes),
        rollouts=actors.rollouts,
        policy=actors.policy,
        weight_sync=actors.weight_sync,
        evaluator=actors.evaluator,
        reference=actors.reference,
        guards=Guards(config.guard, scale_range=max(values) - min(values)),
        export=export,
        log=log,
        progress=progress,
        decode=inputs.tokenizer.decode,
        stop_requested=lambda: stop.requested,
    )


def make_checkpointer(inputs: Inputs, controller: Controller, actors: _Actors, store: CheckpointStore) -> Checkpointer:
    parts: dict[str, Any] = {
        "controller": controller,
        "prompts": controller.batches,
        "rollouts": actors.rollouts,
    }
    if actors.evaluator is not None:
        parts["evaluator"] = actors.evaluator
    return Checkpointer(
        store=store,
        identity=run_identity(inputs),
        policy=actors.policy,
        parts=parts,
        every=inputs.config.ckpt.save_steps,
        metric=inputs.config.ckpt.best_metric,
    )


def render_start(inputs: Inputs, plan: BatchPlan, device: Device) -> str:
    """What the run is about to do, in a few lines of the log."""
    return render_plan(
        inputs.config,
        plan,
        inputs.bound,
        [str(request) for request in placement_requests(inputs.config, device)],
        device=device.name,
        dtype=device.dtype_name,
        reward_tolerance=device.reward_tolerance,
        warnings=(),
    )


class _Actors:
    """All actors of a run, started side by side."""

    def __init__(self, inputs: Inputs, plan: BatchPlan, device: Device) -> None:
        from real_openrlhf.actors.remote import (
            RayEvaluator,
            RayPolicyGroup,
            RayReferenceGroup,
            RayRolloutGroup,
            RayWeightSync,
            on_one_host,
        )

        config = inputs.config
        self.device = device
        env = passed_environment()
        groups = reserve(placement_requests(config, device), config.ray.placement_timeout)
        spec = engine_spec(inputs, device)
        colocated = config.train.colocate_all
        place: dict[str, Any] = dict(device=device, env=env)
        shared: dict[str, Any] = dict(place, share=COLOCATED_SHARE if colocated else 1.0)
        self.rollouts: RayRolloutGroup = RayRolloutGroup(
            spec, n_engines=config.vllm.num_engines, group=groups["rollout"], **shared
        )
        # An engine sizes itself by the GPU's free memory: it comes first, then makes room.
        shared["after"] = [*self.rollouts.ready(), *self.rollouts.fall_asleep()] if colocated else []
        engines = [self.rollouts]
        if "evaluator" in groups:
            own = replace(spec, enable_sleep=False)
            engines.append(RayRolloutGroup(own, n_engines=1, group=groups["evaluator"], **place))
        trainee = policy_spec(inputs, plan, device)
        self.policy: RayPolicyGroup = RayPolicyGroup(trainee, n_ranks=config.ranks, group=groups["policy"], **shared)
        waiting = [ref for group in engines for ref in group.ready()]
        # Now, so that its imports are done when the first evaluation is due.
        self.evaluator = None
        if inputs.benchmarks:
            self.evaluator = RayEvaluator(evaluator_spec(inputs), engines[-1], env=env)
        self.reference: ReferenceGroup | None = None
        if "reference" in groups:
            frozen = RayReferenceGroup(
                reference_spec(trainee, config),
                n_ranks=config.reference_ranks,
                group=groups["reference"],
                device=device,
                env=env,
            )
            self.reference = frozen
            waiting += frozen.ready()
        elif config.algo.kl.init_coef > 0:
            self.reference = self.policy
        built = ray.get([*self.policy.ready(), *waiting])
        self.facts = {name: value for name, value in built[0].items() if isinstance(value, int | float)}
        logger.info("policy: %s; engines: %d", built[0], sum(len(group.engines) for group in engines))
        self._engines = engines
        backend = device.sync_backend(
            config.sync.backend, colocated=colocated, one_host=on_one_host(self.policy, engines)
        )
        logger.info("weights travel by %s", backend)
        self.weight_sync = RayWeightSync(
            self.policy,
            engines,
            probes=probe_sequences(inputs),
            deadline_s=config.sync.deadline,
            max_mean_difference=config.sync.max_mean_difference or device.sync_tolerance,
            backend=backend,
        )

    def shutdown(self) -> None:
        for group in self._engines:
            group.shutdown()


def _device(inputs: Inputs, session: Session) -> Device:
    config = inputs.config
    device = Device.resolve(config.real.device, config.ds.param_dtype, cluster_gpus=math.floor(session.gpus))
    # "auto" on a joined cluster is known only now.
    for warning in validate(config, device="cuda" if device.is_cuda else "cpu"):
        if warning not in inputs.warnings:
            logger.warning("%s", warning)
    return device


def _wandb(config: Config) -> WandbSettings:
    w = config.logger.wandb
    return WandbSettings(mode=w.mode, project=w.project, run_name=w.run_name, group=w.group, org=w.org, key=w.key)


def exported_step(folder: Path) -> int | None:
    """After which step the weights of an exported judge were the policy's; None for none or an old one."""
    try:
        return JudgeSettings.load(folder).step
    except ExportError:
        return None


def _complete_export(inputs: Inputs, export: JudgeExport, folder: Path) -> None:
    """Model card and judge settings beside the weights, then a check of the whole folder."""
    config, chosen = inputs.config, export.chosen
    settings = JudgeSettings(
        scale=config.real.score_scale,
        anchors=config.real.anchor,
        end_ids=tuple(sorted(inputs.end_ids)),
        max_new_tokens=config.rollout.max_new_tokens,
        template=inputs.template,
        temperature=config.rollout.temperature,
        renormalise=config.real.renormalise,
        preset=config.real.preset,
        step=chosen.step,
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
        steps=chosen.step,
        chosen=chosen.why,
        training={
            "learning rate": config.actor.adam.lr,
            "rollouts per prompt": config.rollout.n_samples_per_prompt,
            "prompts per step": config.rollout.batch_size,
            "groups kept": config.real.keep_groups,
            "LoRA adapters": str(config.ds.lora),
            "weight of the KL to the start": config.algo.kl.init_coef,
            "differs from the preset in": ", ".join(config.overridden) or "nothing",
        },
        evaluation=split_metrics(dict(chosen.evaluation)) if chosen.evaluation else None,
        evaluation_data=config.eval.dataset,
    )
    write_model_card(folder, info=info)
    check_export(folder)


def split_metrics(metrics: dict[str, float | None]) -> dict[str, dict[str, float | None]]:
    """ "flask/expected/pearson" -> column "flask/expected", row "pearson"."""
    columns: dict[str, dict[str, float | None]] = {}
    for name, value in metrics.items():
        column, slash, row = name.rpartition("/")
        columns.setdefault(column if slash else "all", {})[row if slash else name] = value
    return columns
