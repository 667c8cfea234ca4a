"""What train_warmup makes of the flags: one schema serves both commands, and each reads a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.presets import WARMUP, preset_values

# Flags, and sections that end in ".", which are about rollouts, advantages and what keeps them honest.
_SAMPLED_ONLY = (
    "ref.",
    "algo.",
    "guard.",
    "rollout.batch_size",
    "rollout.n_samples_per_prompt",
    "rollout.temperature",
    "rollout.top_p",
    "train.max_epochs",
    "train.async_enable",
    "eval.engine",
    "data.judged_key",
    "actor.eps_clip",
    "actor.eps_clip_low_high",
    "actor.entropy_coef",
    "real.preset",
    "real.objective",
    "real.beta",
    "real.answer_reward",
    "real.standardise",
    "real.advantage_clip",
    "real.tolerance",
    "real.invalid_penalty",
    "real.ratio",
    "real.mini_batches",
    "real.keep_groups",
    "real.refill",
    "real.max_refills",
    "real.min_mass",
    "real.min_readable",
    "real.dead_steps",
)
_GIVEN_ONLY = ("warmup.", "data.response_key")


def is_read(name: str, warmup: bool) -> bool:
    """Whether train_warmup, or else train_real, reads the flag."""
    others = _SAMPLED_ONLY if warmup else _GIVEN_ONLY
    return not any(name == other or (other.endswith(".") and name.startswith(other)) for other in others)


def warmup_values(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a warm-up with those that follow from them. Raises ConfigError where one is given that does not.

    A step is one update on --train.batch_size rows, each of which is a prompt with a single response. The
    configuration that a run wrote holds what follows as well, and is taken as it is.
    """
    rows = chosen.get("train.batch_size", preset_values(WARMUP)["train.batch_size"])
    if rows is None:
        raise ConfigError("--train.batch_size none: a warm-up needs the rows per update")
    method = chosen.get("warmup.method", "raft")
    derived = {
        "real.preset": (WARMUP, "leave it out: train_warmup has this one"),
        "real.objective": ("sft" if method == "sft" else "raft", "use --warmup.method"),
        "rollout.batch_size": (rows, "use --train.batch_size: every update is a step"),
    }
    for name, (value, advice) in derived.items():
        if chosen.get(name, value) != value:
            raise ConfigError(f"--{name} {chosen[name]} in train_warmup: {advice}")
    return {**chosen, **{name: value for name, (value, _) in derived.items()}}
