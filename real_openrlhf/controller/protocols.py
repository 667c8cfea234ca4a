"""What the controller sees of the actors. Fakes that fit these run the controller without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import Group, TrainGroup
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.evals.change import EvalReport


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One weight sync: its version, its seconds, and how much the log-probs of engine and policy differ.

    moved: mean absolute change of the policy's log-probs since the sync before; None at the first.
    """

    version: int
    seconds: float
    check_seconds: float
    mean_difference: float
    max_difference: float
    n_tokens: int
    moved: float | None = None


class RolloutGroup(Protocol):
    """All rollout engines, used as one."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of sampling.n rollouts per prompt, in the prompts' order."""
        ...

    def sleep(self) -> None:
        """Free the GPUs' memory until the next weight sync, where engines share GPUs with the policy."""
        ...


class PolicyGroup(Protocol):
    """All ranks of the policy, used as one."""

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Make every update on this batch that the configuration asks for; returns the batch's metrics."""
        ...

    def save_model(self, path: str, complete: Callable[[Path], None]) -> None:
        """Write weights, config and tokenizer as a Hugging Face folder, then let `complete` add files to it.

        The folder appears complete or not at all; an older one of that name stays until then.
        """
        ...

    def save_checkpoint(self, path: str) -> None:
        """Write everything that an exact resume needs of the policy into a new folder."""
        ...

    def load_checkpoint(self, path: str) -> None: ...


class ReferenceGroup(Protocol):
    """The reference policy of the KL: separate ranks, or the policy without its adapters."""

    def reference_logprobs(self, groups: Sequence[TrainGroup]) -> list[tuple[Tensor, ...]]:
        """For each group, one [T] float32 per rollout: log-probs of its tokens at the sampling temperature."""
        ...


class WeightSync(Protocol):
    """Sends the policy's weights to the engines and checks that both give the same log-probs."""

    def sync(self, version: int) -> SyncReport: ...


class Evaluator(Protocol):
    """Judges the held-out benchmarks on some engines and computes metrics."""

    def start(self, version: int) -> None:
        """Start an evaluation of the engines' weights, which have this version. One may run at a time."""
        ...

    def result(self, watch: Callable[[int, int], None] | None = None) -> EvalReport:
        """Wait for the evaluation that was started, and return its report.

        watch: called now and then with the number of responses so far and in all.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
