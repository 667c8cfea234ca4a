"""Carries out a plan: start the actors, train, export, shut down."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from real_openrlhf.algo.objectives import REAL_REWARD
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import TrainGroup, group_scores
from real_openrlhf.checkpoint.manifest import Checkpoint
from real_openrlhf.checkpoint.store import CheckpointStore
from real_openrlhf.config.cli import config_to_dict
from real_openrlhf.controller.checkpointing import Checkpointer, make_store
from real_openrlhf.controller.controller import Controller
from real_openrlhf.controller.guards import Guards
from real_openrlhf.controller.judge_export import JudgeExport
from real_openrlhf.controller.loop import TrainingLoop
from real_openrlhf.controller.output_folder import LIBRARIES_FILE
from real_openrlhf.controller.progress import SHOWN, WARMUP_SHOWN, PhaseTimer, Progress
from real_openrlhf.controller.run_log import RunLog
from real_openrlhf.controller.warmup import WarmupController
from real_openrlhf.data.given import given_group
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import PromptStream
from real_openrlhf.run import specs
from real_openrlhf.run.actors import Actors
from real_openrlhf.run.export import complete_export, exported_step
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.library_log import library_log
from real_openrlhf.run.plan import RunPlan, make_plan
from real_openrlhf.run.plan_text import render
from real_openrlhf.run.ray_session import Session, ray_session
from real_openrlhf.run.restarts import Again, Interrupted
from real_openrlhf.run.signals import StopRequest
from real_openrlhf.run.stopping import in_plain_words
from real_openrlhf.run.waiting import is_fault

logger = logging.getLogger(__name__)


def launch(
    plan: RunPlan, checkpoint: Checkpoint | None, kept: KeptEngines | None, *, stop: StopRequest, again: Again | None
) -> dict[str, Any]:
    """Start, train, export, shut down. Returns the metrics of the last evaluation; raises Stopped after a signal.

    checkpoint: resume from there. kept: see `Actors`. stop: armed here, and left so. again: of a start after a fault.
    The caller holds the locks of the run's folders. Raises Interrupted for a fault (`waiting.is_fault`) once all actors
    have started.
    """
    config = plan.config
    store = make_store(config.ckpt.folder, keep=config.ckpt.max_num, metric=config.ckpt.best_metric)
    with (
        RunLog(
            config.ckpt.output_dir,
            tensorboard_dir=config.logger.tensorboard_dir,
            wandb=config.logger.wandb,
            config=config_to_dict(config),
            append=checkpoint is not None,
            # The folder was checked before anything started (resume.check_folders).
            overwrite=checkpoint is None,
            resume_step=None if checkpoint is None else checkpoint.step,
            locked=True,
            goes_on=checkpoint is not None or again is not None,
        ) as log,
        # Engines that wrote a warm-up's feedback have written to this file too: their lines are kept.
        library_log(
            Path(config.ckpt.output_dir) / LIBRARIES_FILE,
            append=checkpoint is not None or config.supervised or again is not None,
        ) as terminal,
        ray_session(config.ray.address, num_cpus=config.ray.num_cpus, needed_cpus=plan.needed_cpus) as session,
        in_plain_words(lambda: stop.requested, store),
    ):
        stop.arm()  # not earlier: ray.init installs its own SIGTERM handler
        plan = on_cluster(plan, session)
        logger.info("%s", render(plan, for_log=True))
        timer = PhaseTimer()
        with timer.phase("start"):
            actors = Actors(plan, kept)
            # Checked even without --ckpt.save_steps, since a signal saves a checkpoint too.
            store.check_shared(actors.policy.sees)
        if checkpoint is None:
            log.log(0, "sync", {"seconds/start": timer.seconds("start"), **actors.facts})
        initial = 0 if checkpoint is None else checkpoint.step
        if again is not None:
            log.warn(initial, "fault", f"{again.why}; started again from {again.where}")
        with Progress(
            plan.batch.total_steps,
            initial=initial,
            enabled=config.logger.progress,
            shown=WARMUP_SHOWN if config.supervised else SHOWN,
            stream=terminal,
        ) as progress:
            metrics = train(plan, checkpoint, store, actors, log, progress, stop)
        actors.shutdown()
    return metrics


def train(
    plan: RunPlan,
    checkpoint: Checkpoint | None,
    store: CheckpointStore,
    actors: Actors,
    log: RunLog,
    progress: Progress,
    stop: StopRequest,
) -> dict[str, Any]:
    """The run, from its start or checkpoint to its end."""
    ckpt = plan.config.ckpt
    controller = make_controller(plan, actors, log, progress, stop)
    saver = Checkpointer(
        store=store,
        identity=plan.identity,
        policy=actors.policy,
        parts=controller.checkpointed_parts(),
        every=ckpt.save_steps,
        metric=ckpt.best_metric,
    )
    try:
        if checkpoint is not None:
            saver.load(checkpoint)
        return controller.fit(saver)
    except Exception as error:
        if is_fault(error):
            raise Interrupted(controller.step_number) from error
        raise
    finally:
        log.page(last=True)


def on_cluster(plan: RunPlan, session: Session) -> RunPlan:
    """The plan made again for a joined cluster, whose GPUs were not known before. DeviceError if it lacks them."""
    if session.owned:
        return plan
    known = make_plan(plan.inputs, cluster_gpus=math.floor(session.gpus))
    for warning in known.warnings:
        if warning not in plan.warnings:
            logger.warning("%s", warning)
    return known


def make_controller(plan: RunPlan, actors: Actors, log: RunLog, progress: Progress, stop: StopRequest) -> TrainingLoop:
    config, inputs = plan.config, plan.inputs
    if inputs.given is not None:
        return warmup_controller(plan, actors, log, progress, stop)
    assert actors.rollouts is not None and actors.weight_sync is not None
    values = config.real.score_scale.values
    judged = {prompt.row: prompt.judged_ids for prompt in inputs.train_set.prompts}
    return Controller(
        plan.controller,
        scale=config.real.score_scale,
        objective=plan.objective,
        prompts=prompt_stream(plan),
        rollouts=actors.rollouts,
        policy=actors.policy,
        weight_sync=actors.weight_sync,
        evaluator=actors.evaluator,
        reference=actors.reference,
        guards=Guards(
            config.guard,
            scale_range=max(values) - min(values),
            held_out_reward=config.real.objective in REAL_REWARD,
        ),
        export=judge_export(plan, actors),
        log=log,
        progress=progress,
        decode=inputs.tokenizer.decode,
        judged=judged.get,
        stop_requested=lambda: stop.requested,
    )


def warmup_controller(
    plan: RunPlan, actors: Actors, log: RunLog, progress: Progress, stop: StopRequest
) -> WarmupController:
    inputs, scale = plan.inputs, plan.config.real.score_scale
    given = inputs.given
    assert given is not None
    reader = ScoreReader.build(inputs.bound, inputs.tokenizer, inputs.end_ids)

    def group_of(prompt: Prompt) -> TrainGroup:
        group = given_group(prompt, given.responses[prompt.row], reader)
        target = scale.target(prompt.label)
        coefficients = plan.objective(group_scores(group, scale.tensor(), target))
        return TrainGroup(group=group, target=target, coefficients=coefficients)

    return WarmupController(
        specs.warmup_settings(plan.config, plan.batch),
        prompts=prompt_stream(plan),
        group_of=group_of,
        policy=actors.policy,
        engines=actors.rollouts,
        weight_sync=actors.weight_sync,
        evaluator=actors.evaluator,
        export=judge_export(plan, actors),
        log=log,
        progress=progress,
        stop_requested=lambda: stop.requested,
    )


def prompt_stream(plan: RunPlan) -> PromptStream:
    train = plan.config.train
    return PromptStream(plan.inputs.train_set.prompts, seed=train.seed, num_episodes=train.num_episodes)


def judge_export(plan: RunPlan, actors: Actors) -> JudgeExport:
    return JudgeExport(
        actors.policy,
        plan.model_folder,
        metric=plan.config.ckpt.best_metric if plan.inputs.benchmarks else None,
        describe=lambda folder, chosen: complete_export(plan, folder, chosen),
        step_of=exported_step,
    )
