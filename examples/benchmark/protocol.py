"""What the benchmark's harness and its contestants say to each other.

A contestant lives in a process of its own (`python -m examples.benchmark.worker`), which the harness
starts and to which it speaks in JSON, one object a line; see `worker.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    seconds      by phase: "old_logprobs", "expected_score" (the authors' no-grad pass), "experience" (rewards and
                 advantages, collating), "forward", "backward", "optimizer"; a contestant leaves out what it does not do
    total        wall seconds of the whole training step, everything but the weight sync
    peak_bytes   highest memory of the step above what the process held before it (weights, gradients, optimizer)
    loss         what was minimised, so that a step that computed nothing is seen
    """

    contestant: str
    case: Case
    seconds: dict[str, float]
    total: float
    peak_bytes: int
    loss: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
