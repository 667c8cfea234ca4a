"""What the controller sees of the actors. Fakes that fit these run the controller without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from real_openrlhf.algo.types import Group, TrainGroup
from real_openrlhf.data.prompt import Prompt

if TYPE_CHECKING:
    from real_openrlhf.evals.change import Change


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    temperature   0 is greedy
    seed          None leaves the engine's own
    continues     the prompts go on behind what the engine has just been asked: it may keep what it computed for that
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None = None
    continues: bool = False


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One weight sync: its version, seconds, and how far engine and policy log-probs lie apart."""

    version: int
    seconds: float
    check_seconds: float
    mean_difference: float
    max_difference: float
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """One evaluation of the weights of this version.

    metrics  by flat name ("expected/pearson")
    changes  of "reward" and "expected/pearson"; empty for the first evaluation
    samples  a few judgements to read
    plots    name -> path of a PNG
    seconds  that it took, from its start to its last metric
    """

    version: int
    metrics: dict[str, float | None]
    changes: dict[str, Change] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class RolloutGroup(Protocol):
    """The rollout engines as one."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of sampling.n rollouts per prompt, in the prompts' order."""
        ...

    def sleep(self) -> None:
        """Give up the GPUs' memory until the next weight sync, where engines share them with the policy."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PolicyGroup(Protocol):
    """The ranks of the policy as one."""

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Every update that the configuration asks for on this batch; metrics of the batch."""
        ...

    def save_model(self, path: str) -> None:
        """Write weights, config and tokenizer as a Hugging Face folder."""
        ...

    def save_checkpoint(self, path: str) -> None:
        """Write everything that an exact resume needs of the policy into a new folder."""
        ...

    def load_checkpoint(self, path: str) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
