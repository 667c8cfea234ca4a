"""Metrics of a step besides those of its rollouts: what was sampled, what was kept, how fast. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from real_openrlhf.algo.types import Group, TrainGroup
from real_openrlhf.controller.batches import Batch
from real_openrlhf.controller.dynamic_sampling import Collected


def sampled_reward(
    collected: Collected, trained: Sequence[TrainGroup], train_group: Callable[[Group], TrainGroup]
) -> float | None:
    """Mean reward of all sampled rollouts, including those that dynamic sampling dropped."""
    known = {id(t.group): t for t in trained}
    everything = [known.get(id(group)) or train_group(group) for group in collected.sampled]
    rewards = [float(r) for t in everything for r in t.coefficients.rewards]
    return sum(rewards) / len(rewards) if rewards else None


def sampling_metrics(collected: Collected) -> dict[str, float]:
    return {
        "sampling/pass_rate": collected.pass_rate,
        "sampling/waves": float(collected.waves),
        "sampling/groups": float(len(collected.sampled)),
        "sampling/kept": float(len(collected.kept)),
    }


def speed_metrics(seconds: Mapping[str, float], batch: Batch) -> dict[str, float]:
    """seconds: of the controller's phases, whose sum is the step. batch.seconds: all of generation, training or not."""
    collected = batch.collected
    generated = sum(r.token_ids.numel() for g in collected.sampled for r in g.rollouts)
    trained = sum(g.prompt_ids.numel() + r.token_ids.numel() for g in collected.kept for r in g.rollouts)
    return {
        **seconds,
        "speed/tokens_per_second": generated / max(sum(seconds.values()), 1e-9),
        "speed/generated_tokens_per_second": generated / max(batch.seconds, 1e-9),
        "speed/trained_tokens_per_second": trained / max(seconds["seconds/train"], 1e-9),
    }
