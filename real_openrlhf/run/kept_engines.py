"""Rollout engines that outlive a run: for many short runs in one process, of which each trains for a minute or two.

Every run begins with a weight sync and its check, so an engine's next run does not see the weights of the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from real_openrlhf.actors.engine.spec import EngineSpec
from real_openrlhf.run.placement import ROLLOUT, Bundle, release, reserve
from real_openrlhf.run.plan import RunPlan
from real_openrlhf.run.ray_groups import RayRolloutGroup

# In a model's config.json, what does not change the network.
_NOT_THE_NETWORK = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class KeptEngines:
    """The engines of one process's runs, which follow each other inside one Ray session."""

    def __init__(self) -> None:
        self._wanted: Any = None
        self._engines: RayRolloutGroup | None = None
        self._places: dict[str, list[Bundle]] = {}

    def take(self, plan: RunPlan, env: Mapping[str, str]) -> RayRolloutGroup:
        """The engines of the run before if they suit this plan; else these end, and others start.

        Models may differ in their weights. ValueError for engines that share their GPUs with the policy or sleep.
        """
        config = plan.config
        if config.train.colocate_all or config.vllm.enable_sleep:
            raise ValueError("engines that share GPUs with the policy cannot be kept from run to run")
        wanted = (*same_engines(plan.engine), config.vllm.num_engines)
        if self._engines is None or wanted != self._wanted:
            self.shutdown()
            requests = [request for request in plan.placement if request.name == ROLLOUT]
            self._places = reserve(requests, config.ray.placement_timeout)
            self._engines = RayRolloutGroup(
                plan.engine,
                n_engines=config.vllm.num_engines,
                group=self._places[ROLLOUT],
                device=plan.device,
                env=dict(env),
            )
            self._wanted = wanted
        self._engines.call_timeout_s = config.ray.call_timeout
        return self._engines

    def shutdown(self) -> None:
        """End the engines, if there are any."""
        if self._engines is not None:
            with suppress(ray.exceptions.RayError):  # they may have ended with an error before
                self._engines.shutdown()
            for engine in self._engines.engines:
                ray.kill(engine)
            release(self._places)
        self._engines, self._places = None, {}


def same_engines(spec: EngineSpec) -> tuple[EngineSpec, dict[str, Any]]:
    """What two engines have in common if one can do the other's work: all but the weights and the seed.

    Seeds do not matter to runs with full determinism; other runs sample differently each time anyway.
    """
    path = Path(spec.model) / "config.json"
    network = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"hub": spec.model}
    kept = {name: value for name, value in network.items() if name not in _NOT_THE_NETWORK}
    return replace(spec, model="", seed=0), kept
