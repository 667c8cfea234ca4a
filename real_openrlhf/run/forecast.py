"""What a run will take on its GPUs: memory, time, and advice where it does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from real_openrlhf.common.cards import DEFAULT_RATES, RATES, Card, local_cards, rates_of
from real_openrlhf.common.device import Device
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config
from real_openrlhf.run import specs
from real_openrlhf.run.assumed_gpus import AssumedGpus
from real_openrlhf.run.fitting import gb, nearest_fit, why_not
from real_openrlhf.run.memory import MemoryPlan, Question, host_bytes, memory_plan
from real_openrlhf.run.model_shape import ModelShape
from real_openrlhf.run.ray_session import cluster_to_join
from real_openrlhf.run.time_plan import Cluster, TimePlan, time_plan

_ITEMSIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """time: None for a model whose layers are of another kind, and for a warm-up. warnings: that it may not fit."""

    memory: MemoryPlan
    time: TimePlan | None
    warnings: tuple[str, ...]


def forecast(config: Config, device: Device, prompts: Sequence[int], assumed: AssumedGpus | None) -> Forecast | None:
    """None where nothing is known: on a CPU, without GPUs here (as on a head node), or without the model's config.

    prompts: tokens of each. Raises ConfigError for a model that cannot fit into these GPUs; a warning where only
    estimates say so, or where a cluster that is joined may have other GPUs.
    """
    cards = local_cards() if assumed is None else assumed.cards
    if not device.is_cuda or not cards or (torch.version.cuda is None and assumed is None):
        return None
    shape = ModelShape.of(config.actor.model_name_or_path, config.ds.lora)
    if shape is None:
        return None
    card = max(cards, key=lambda card: card.memory)
    asked = Question(
        shape=shape,
        itemsize=_ITEMSIZE[device.dtype_name],
        card=card.memory,
        prompt=max(prompts, default=1),
        liger=_has_liger(config),
    )
    memory = memory_plan(config, asked)
    rates = rates_of(card.name)
    name = card.name if rates is not None else f"{DEFAULT_RATES}, since none are known of {card.name}"
    cluster = Cluster(card=name, rates=rates or RATES[DEFAULT_RATES])
    mean = sum(prompts) / max(len(prompts), 1)
    return Forecast(
        memory=memory,
        # A warm-up samples nothing, and its responses are as long as the data's.
        time=None if config.supervised else time_plan(config, asked, memory.engine, cluster, mean),
        warnings=tuple(_problem(config, asked, memory, assumed, cards, device)),
    )


def _has_liger(config: Config) -> bool:
    """As the policy decides it, by the packages of this environment."""
    chosen = config.ds.use_liger_kernel
    return find_spec("liger_kernel") is not None if chosen is None else chosen


def _problem(
    config: Config,
    asked: Question,
    memory: MemoryPlan,
    assumed: AssumedGpus | None,
    cards: Sequence[Card],
    device: Device,
) -> list[str]:
    joined = bool(cluster_to_join(config.ray.address)) and assumed is None
    needed, there = host_bytes(memory.host), _cpu_memory()
    warnings = []
    if assumed is None and not joined and needed > there:
        warnings.append(
            f"a policy node needs about {gb(needed)} of CPU memory "
            f"({', '.join(f'{term.name} {gb(term.bytes)}' for term in memory.host)}), this machine has {gb(there)}"
        )
    if memory.fits:
        return warnings
    allowed = _room(assumed or (None if joined else _here(cards)), device)
    fit = nearest_fit(config, asked, allowed)
    if fit is not None:
        advice = f"it fits with {fit}"
    else:
        advice = (
            "no few flags make it fit on as many GPUs; use more of them (--actor.num_nodes, "
            "--actor.num_gpus_per_node), or larger ones"
        )
    problem = f"{why_not(memory, config)}; {advice}"
    if joined:
        return [*warnings, f"if the cluster's GPUs are like this machine's: {problem}"]
    if not memory.may_fit:
        raise ConfigError(problem)
    return [*warnings, f"this may run out of memory, by an estimate: {problem}"]


def _cpu_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _here(cards: Sequence[Card]) -> AssumedGpus:
    return AssumedGpus(nodes=1, gpus_per_node=len(cards), memory=max(card.memory for card in cards))


def _room(gpus: AssumedGpus | None, device: Device) -> Callable[[Config], bool]:
    """Whether a plan's actors have their places. None: nothing is known of the cluster's GPUs."""

    def allowed(config: Config) -> bool:
        if gpus is None:
            return True
        try:
            gpus.check_places(specs.placement_requests(config, device))
        except ConfigError:
            return False
        return True

    return allowed
