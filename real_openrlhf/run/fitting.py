"""Why a plan does not fit, and the nearest one that does: the fewest flags, those that cost least first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from real_openrlhf.config.convert import get_value
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate
from real_openrlhf.run.memory import MemoryPlan, Phase, Place, Question, host_bytes, memory_plan
from real_openrlhf.run.model_shape import ModelShape

Change = Mapping[str, Any]
# Of one answer: more flags than this are no longer near.
_MOST_CHANGES = 4
# Shares of the GPU for engines that share it.
_SMALLER = (0.7, 0.6, 0.5, 0.4, 0.3)


def why_not(plan: MemoryPlan, config: Config) -> str:
    """What does not fit, by how much, and the term that breaks it. ValueError for a plan that fits."""
    of, engine = f"of {plan.parameters / 1e9:.1f} billion parameters", plan.engine
    if not engine.starts:
        text = (
            f"an engine has {gb(engine.weights)} of weights {of} on each of its {config.vllm.tensor_parallel_size} "
            f"GPU(s), and may take {gb(engine.share)} (--vllm.gpu_memory_utilization {config.engine_utilisation:g} of "
            f"{gb(plan.card)})"
        )
        if engine.weights > engine.share:
            return text
        return (
            f"{text}; beside {gb(engine.work)} of work that leaves room for {engine.cache_tokens} tokens of KV cache, "
            f"and --data.max_len is {engine.needed}"
        )
    place, phase = _worst(plan)
    least = phase.certain > plan.card
    needs = f"needs {'at least' if least else 'about'} {gb(phase.certain if least else phase.total)}"
    counted = [term for term in phase.terms if term.bytes and (term.exact or not least)]
    terms = sorted(counted, key=lambda term: -term.bytes)[:4]
    shown = ", ".join(f"{term.name} {gb(term.bytes)}" for term in terms)
    return (
        f"{place.name} {of} {needs} on each of {place.gpus} GPU(s) ({phase.name}: {shown}), which have "
        f"{gb(plan.card)}; the table's sum passes that at {phase.breaking(plan.card).name!r}"
    )


def _worst(plan: MemoryPlan) -> tuple[Place, Phase]:
    both = [(place, phase) for place in plan.places for phase in place.phases]
    return max(both, key=lambda pair: (max(pair[1].certain - plan.card, 0), pair[1].total))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Flags that make a plan fit. host: bytes in CPU memory of a policy node then."""

    change: Change
    host: int

    def __str__(self) -> str:
        return f"{as_flags(self.change)} (CPU memory of a policy node: {gb(self.host)})"


def nearest_fit(config: Config, asked: Question, allowed: Callable[[Config], bool]) -> Fit | None:
    """None where no few flags make it fit.

    allowed: whether the GPUs that are there hold the plan's actors.
    """
    candidates = [_difference(config, change) for change in _candidates(config, asked)]
    # Adapters train something else: they come when nothing else helps.
    last: list[Change] = [] if config.ds.lora.rank else [{"ds.lora.rank": 16}]
    for extra in ([], last):
        for count in range(_MOST_CHANGES + 1):
            for chosen in combinations([change for change in candidates if change], count):
                fit = _fit(config, [*extra, *chosen], asked, allowed)
                if fit is not None:
                    return fit
    return None


def _difference(config: Config, change: Change) -> Change:
    return {name: value for name, value in change.items() if get_value(config, name) != value}


def _fit(config: Config, chosen: Sequence[Change], asked: Question, allowed: Callable[[Config], bool]) -> Fit | None:
    """None where these flags contradict each other, or do not make it fit."""
    change = {name: value for part in chosen for name, value in part.items()}
    if len(change) < sum(map(len, chosen)):
        return None  # two values for one flag
    changed = _changed(config, change)
    plan = None if changed is None else _planned(changed, asked)
    if changed is None or plan is None or not plan.fits or not allowed(changed):
        return None
    return Fit(change=change, host=host_bytes(plan.host))


def _planned(config: Config, asked: Question) -> MemoryPlan | None:
    """None where adapters are asked for that the model does not take."""
    if config.ds.lora.rank and not asked.shape.frozen:
        try:
            shape = ModelShape.of(config.actor.model_name_or_path, config.ds.lora)
        except ValueError:
            return None
        if shape is None:
            return None
        asked = replace(asked, shape=shape)
    return memory_plan(config, asked)


def _changed(config: Config, change: Change) -> Config | None:
    """None for flags that contradict each other."""
    try:
        changed: Config = _with(config, change)
        validate(changed, device="cuda")
    except ConfigError:
        return None
    return changed


def _with(section: Any, change: Change) -> Any:
    """The section with other values of flags, named from it on."""
    own = {name: value for name, value in change.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in change.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
    return replace(section, **own, **{head: _with(getattr(section, head), part) for head, part in inner.items()})


def _candidates(config: Config, asked: Question) -> Iterator[Change]:
    """Those that change least about the run first."""
    train, vllm, ds = config.train, config.vllm, config.ds
    decoder = asked.shape.decoder
    if not config.actor.gradient_checkpointing_enable:
        yield {"actor.gradient_checkpointing_enable": True}
    if ds.zero_stage < 3:
        yield {"ds.zero_stage": 3}
    if train.colocate_all:
        yield {"vllm.enable_sleep": True, "ds.enable_sleep": True}
        yield from ({"vllm.gpu_memory_utilization": u} for u in _SMALLER if u < config.engine_utilisation)
    for width in (2, 4, 8):
        workers = vllm.num_engines * vllm.tensor_parallel_size
        if width > vllm.tensor_parallel_size and workers % width == 0 and (not decoder or decoder.heads % width == 0):
            yield {"vllm.tensor_parallel_size": width, "vllm.num_engines": workers // width}
        elif width > vllm.tensor_parallel_size and (not decoder or decoder.heads % width == 0):
            yield {"vllm.tensor_parallel_size": width}
    for tokens in (train.max_tokens_per_gpu // 2, config.data.max_len):
        if config.data.max_len <= tokens < train.max_tokens_per_gpu:
            yield {"train.max_tokens_per_gpu": tokens}
    for megabytes in (2048, 1024):
        yield {"real.logits_mb": megabytes}
    for gpus in (2, 4, 8):
        if gpus > config.actor.num_gpus_per_node and not train.colocate_all:
            yield {"actor.num_gpus_per_node": gpus}
    if not ds.adam_offload and not ds.lora.rank:
        yield {"ds.adam_offload": True}
    if not train.colocate_all:
        yield from _together(config)


def _together(config: Config) -> Iterator[Change]:
    """Policy and engines on all the GPUs that both had, taking turns."""
    workers = config.vllm.num_engines * config.vllm.tensor_parallel_size
    per_node, more = divmod(config.ranks + workers, config.actor.num_nodes)
    for width in (config.vllm.tensor_parallel_size, 2, 4, 8):
        if not more and per_node % width == 0:
            yield {
                "train.colocate_all": True,
                "vllm.enable_sleep": True,
                "ds.enable_sleep": True,
                "ds.zero_stage": 3,
                "actor.num_gpus_per_node": per_node,
                "vllm.num_engines": (config.ranks + workers) // width,
                "vllm.tensor_parallel_size": width,
            }


def as_flags(change: Change) -> str:
    """As they are written on the command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
