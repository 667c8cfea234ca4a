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
    """One weight sync: its version, seconds, and how far engine and policy log-probs lie apart."""

    version: int
    seconds: float
    check_seconds: float
    mean_difference: float
    max_difference: float
    n_tokens: int


class RolloutGroup(Protocol):
    """The rollout engines as one."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of sampling.n rollouts per prompt, in the prompts' order."""
        ...

    def sleep(self) -> None:
        """Give up the GPUs' memory until the next weight sync, where engines share them with the policy."""
        ...


class PolicyGroup(Protocol):
    """The ranks of the policy as one."""

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Every update that the configuration asks for on this batch; metrics of the batch."""
        ...

    def save_model(self, path: str, complete: Callable[[Path], None]) -> None:
        """Write weights, config and tokenizer as a Hugging Face folder, to which `complete` then adds.

        The folder appears whole or not at all; an older one stays until then.
        """
        ...

    def save_checkpoint(self, path: str) -> None:
        """Write everything that an exact resume needs of the policy into a new folder."""
        ...

    def load_checkpoint(self, path: str) -> None: ...


class ReferenceGroup(Protocol):
    """The reference policy of the KL: a group of its own, or the policy without its adapters."""

    def reference_logprobs(self, groups: Sequence[TrainGroup]) -> list[tuple[Tensor, ...]]:
        """Per group one [T] float32 for each rollout: log-probs of its tokens at the sampling temperature."""
        ...


class WeightSync(Protocol):
    """Brings the policy's weights to the engines and proves it."""

    def sync(self, version: int) -> SyncReport: ...


class Evaluator(Protocol):
    """Judges the held-out benchmarks on some engines and computes metrics."""

    def start(self, version: int) -> None:
        """Begin with an evaluation of the engines' weights, which have this version; one at a time."""
        ...

    def result(self, watch: Callable[[int, int], None] | None = None) -> EvalReport:
        """Of the evaluation that was begun, once it is done. watch: told now and then how many responses of how
        many there are."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
