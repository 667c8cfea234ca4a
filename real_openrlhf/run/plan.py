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
    """All decisions of a run. --dry_run prints this plan, and a run is built from the same plan.

    inputs           the configuration, with what was read from files
    device           device and dtype of the model; before a cluster is joined, what the flags imply
    batch            number of rollouts, updates and steps
    placement        the resource bundles that Ray is asked for
    needed_cpus      CPU slots for actors; a cluster that this run starts itself has at least these
    objective, engine, policy, evaluator, controller   settings from which the parts of the run are built
    reference        the same for separate reference ranks; None: there are none
    evaluator        None: no evaluation
    evaluator_engine the evaluator's own engine; None: it uses the rollout engines
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
        """Where the exported judge is written."""
        return Path(self.config.ckpt.output_dir) / "model"

    @property
    def reward_tolerance(self) -> float:
        """Rewards of one prompt that differ by less than this count as equal. For the printed plan."""
        tolerance = self.config.real.tolerance
        return self.device.reward_tolerance if tolerance is None else tolerance

    @cached_property
    def identity(self) -> RunIdentity:
        return run_identity(self.inputs)


def make_plan(inputs: Inputs, *, cluster_gpus: int | None = None) -> RunPlan:
    """The plan that follows from flags and data.

    cluster_gpus: number of GPUs of the cluster that was joined; None: no cluster was joined yet.
    Raises ConfigError for flags that contradict each other and for a model that cannot fit into memory, DeviceError
    if the device is not there.
    """
    config, device, warnings = inputs.config, inputs.device, list(inputs.warnings)
    if device is None or cluster_gpus is not None:
        device = Device.resolve(config.real.device, config.ds.param_dtype, cluster_gpus=cluster_gpus)
        # Checks that depend on the device could not be made when the flags were read.
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
