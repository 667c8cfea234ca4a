"""Messages between the benchmark's harness and its contestants.

A contestant runs in a separate process (`python -m examples.benchmark.worker`), which the harness starts. Messages are
JSON objects, one per line; see `worker.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

CONTESTANTS = ("real", "openrlhf", "authors")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the benchmark: a step on one prompt of `prompt` tokens with `samples` rollouts of `response` tokens.

    micro_batch             rollouts per forward and backward pass
    gradient_checkpointing  layers are computed again in the backward pass
    """

    prompt: int
    response: int
    samples: int
    micro_batch: int
    gradient_checkpointing: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One training step as one contestant ran it.

    seconds      by phase: "old_logprobs", "expected_score" (the authors' no-grad pass), "experience" (rewards,
                 advantages, collating, and all else), "forward", "backward", "optimizer"; a contestant leaves out
                 phases that it does not have; they add up to total
    total        wall seconds of the whole training step, without the weight sync
    peak_bytes   highest memory of the step above weights, gradients and optimizer
    peaks        the same by phase; memory used between two phases counts for the second
    loss         what was minimised; OpenRLHF's ratios are 1 on-policy and its advantages of a group add up to 0, so
                 with rollouts of equal length its loss is 0 up to rounding
    facts        values that show that contestants computed the same: "logprob_sum", over all response tokens;
                 "grad_norm", before clipping; "expected_score", the mean of E[score], if it is computed
    """

    contestant: str
    case: Case
    seconds: dict[str, float]
    total: float
    peak_bytes: int
    loss: float
    facts: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
