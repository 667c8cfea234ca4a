"""The plan of a run: everything that follows from flags and data, worked out once, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from real_openrlhf.actors.engine.spec import EngineSpec
from real_openrlhf.actors.policy.spec import PolicySpec
from real_openrlhf.algo.objectives.base import Objective
from real_openrlhf.checkpoint.compat import RunIdentity
from real_openrlhf.common.device import Device
from real_openrlhf.config.batch_plan import BatchPlan, batch_plan
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.controller.settings import ControllerSettings
from real_openrlhf.evals.evaluator import EvaluatorSpec
from real_openrlhf.run import specs
from real_openrlhf.run.forecast import Forecast, forecast
from real_openrlhf.run.identity import run_identity
from real_openrlhf.run.inputs import Inputs
from real_openrlhf.run.placement import Request


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What --dry_run shows is what the start takes.

    device           where the model lives; on a cluster that is not joined yet, what the flags believe of it
    batch            rollouts, updates and steps
    placement        bundles that Ray is asked for
    needed_cpus      slots for actors that a cluster of this run's own must have
    objective, engine, policy, evaluator, controller   what the parts of the run are built from
    reference        None: no reference policy of its own
    evaluator        None: no evaluation
    evaluator_engine its own engine; None: it uses the rollout engines
    probes           token sequences on which engines and policy are compared after a weight sync
    forecast         memory and time; None where nothing is known of the GPUs
    identity         what a checkpoint must have in common with the run
    warnings         all of them, each once
    """

    inputs: Inputs
    device: Device
    batch: BatchPlan
    placement: tuple[Request, ...]
    needed_cpus: float
    objective: Objective
    engine: EngineSpec
    policy: PolicySpec
    reference: PolicySpec | None
    evaluator: EvaluatorSpec | None
    evaluator_engine: EngineSpec | None
    controller: ControllerSettings
    probes: tuple[tuple[int, ...], ...]
    forecast: Forecast | None
    warnings: tuple[str, ...]

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def model_folder(self) -> Path:
        """Of the exported judge."""
        return Path(self.config.ckpt.output_dir) / "model"

    @property
    def reward_tolerance(self) -> float:
        """Rewards of one prompt that lie closer count as equal."""
        tolerance = self.config.real.tolerance
        return self.device.reward_tolerance if tolerance is None else tolerance

    @cached_property
    def identity(self) -> RunIdentity:
        return run_identity(self.inputs)


def make_plan(inputs: Inputs, *, cluster_gpus: int | None = None) -> RunPlan:
    """Raises ConfigError for flags that cannot go together, or a model that cannot fit; DeviceError without the device.

    cluster_gpus: of the cluster that was joined; None: none was.
    """
    config, device, warnings = inputs.config, inputs.device, list(inputs.warnings)
    if device is None or cluster_gpus is not None:
        device = Device.resolve(config.real.device, config.ds.param_dtype, cluster_gpus=cluster_gpus)
        # What depends on the device was left out before.
        warnings += validate(config, device="cuda" if device.is_cuda else "cpu")
    assumed = inputs.assumed_gpus
    prompts = [len(prompt.token_ids) for prompt in inputs.train_set.prompts]
    expected = forecast(config, device, prompts, assumed)
    warnings += expected.warnings if expected is not None else ()
    batch = batch_plan(config, len(inputs.train_set))
    placement = tuple(specs.placement_requests(config, device))
    if assumed is not None:
        assumed.check_places(placement)
    policy = specs.policy_spec(inputs, batch, device)
    engine = specs.engine_spec(inputs, device)
    return RunPlan(
        inputs=inputs,
        device=device,
        batch=batch,
        placement=placement,
        needed_cpus=float(config.ranks + config.reference_ranks + specs.engine_workers(config)),
        objective=specs.objective_of(config, device),
        engine=engine,
        policy=policy,
        reference=specs.reference_spec(policy, config) if config.reference_ranks else None,
        evaluator=specs.evaluator_spec(inputs) if inputs.benchmarks else None,
        evaluator_engine=specs.evaluator_engine(engine, config),
        controller=specs.controller_settings(config, batch),
        probes=specs.probe_sequences(inputs),
        forecast=expected,
        warnings=tuple(dict.fromkeys(warnings)),
    )
