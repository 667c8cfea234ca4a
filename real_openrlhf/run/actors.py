"""All actors of a run, started side by side, and the weight sync between them."""

from __future__ import annotations

import logging
from typing import Any

import ray

from real_openrlhf.common.errors import one_line
from real_openrlhf.controller.protocols import ReferenceGroup
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.placement import COLOCATED_SHARE, ROLLOUT, release, reserve
from real_openrlhf.run.plan import RunPlan
from real_openrlhf.run.ray_groups import (
    RayPolicyGroup,
    RayReferenceGroup,
    RayRolloutGroup,
    RayWeightSync,
    on_one_host,
    start_evaluator,
)
from real_openrlhf.run.ray_session import passed_environment
from real_openrlhf.run.waiting import wait_for

logger = logging.getLogger(__name__)


class Actors:
    """All actors of a run, started side by side.

    rollouts, weight_sync: None in a warm-up without evaluation, where nothing is sampled.
    """

    def __init__(self, plan: RunPlan, kept: KeptEngines | None = None) -> None:
        """kept: the rollout engines come from there and stay; `shutdown` ends all other actors."""
        config, device = plan.config, plan.device
        env = passed_environment()
        self._kept = kept
        # First, since it refuses what cannot be kept.
        lasting = kept.take(plan, env) if kept is not None and config.uses_engines else None
        mine = [request for request in plan.placement if lasting is None or request.name != ROLLOUT]
        self._places = groups = reserve(mine, config.ray.placement_timeout)
        colocated = config.train.colocate_all
        timeout = config.ray.call_timeout
        place: dict[str, Any] = dict(device=device, env=env, call_timeout_s=timeout)
        shared: dict[str, Any] = dict(place, share=COLOCATED_SHARE if colocated else 1.0)
        engines: list[RayRolloutGroup] = []
        if lasting is not None:
            engines.append(lasting)
        elif config.uses_engines:
            engines.append(
                RayRolloutGroup(plan.engine, n_engines=config.vllm.num_engines, group=groups[ROLLOUT], **shared)
            )
        # An engine sizes itself by the GPU's free memory: it comes first, then makes room.
        makes_room = engines[0] if colocated and engines else None
        shared["after"] = [] if makes_room is None else [*makes_room.ready(), *makes_room.fall_asleep()]
        self.rollouts = engines[0] if engines else None
        if plan.evaluator_engine is not None:
            engines.append(RayRolloutGroup(plan.evaluator_engine, n_engines=1, group=groups["evaluator"], **place))
        self.policy = RayPolicyGroup(plan.policy, n_ranks=config.ranks, group=groups["policy"], **shared)
        waiting = [ref for group in engines for ref in group.ready()]
        # Started now, so that its imports are done when the first evaluation begins.
        self.evaluator = None
        if plan.evaluator is not None:
            self.evaluator = start_evaluator(plan.evaluator, engines[-1], env=env, call_timeout_s=timeout)
        self.reference: ReferenceGroup | None = None
        if plan.reference is not None:
            frozen = RayReferenceGroup(
                plan.reference,
                n_ranks=config.reference_ranks,
                group=groups["reference"],
                **place,
            )
            self.reference = frozen
            waiting += frozen.ready()
        elif config.algo.kl.init_coef > 0:
            self.reference = self.policy
        built = wait_for([*self.policy.ready(), *waiting], "the actors' start")
        self.facts = {name: value for name, value in built[0].items() if isinstance(value, int | float)}
        logger.info("policy: %s; engines: %d", built[0], sum(len(group.engines) for group in engines))
        self._engines = engines
        self.weight_sync: RayWeightSync | None = None
        if not engines:
            return
        backend = device.sync_backend(
            config.sync.backend, colocated=colocated, one_host=on_one_host(self.policy, engines)
        )
        logger.info("weights travel by %s", backend)
        self.weight_sync = RayWeightSync(
            self.policy,
            engines,
            probes=plan.probes,
            deadline_s=config.sync.deadline,
            max_mean_difference=config.sync.max_mean_difference or device.sync_tolerance,
            backend=backend,
        )

    def shutdown(self) -> None:
        """End the engines. Kept ones stay, but all else ends: the cluster lives on, and the next run needs room."""
        for group in self._engines:
            if self._kept is None or group is not self.rollouts:
                _end(group)
        if self._kept is None:
            return
        frozen = self.reference if isinstance(self.reference, RayReferenceGroup) else None
        for part in (self.policy, frozen, self.evaluator):
            if part is not None:
                part.end()
        release(self._places)


def _end(engines: RayRolloutGroup) -> None:
    """What goes wrong here is said only: the judge is exported, and the run has not failed."""
    try:
        engines.shutdown()
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("an engine did not end by itself: %s", one_line(error))
