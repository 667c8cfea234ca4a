"""Dynamic sampling: which groups are worth training on, and how a batch is filled with them.

The paper's filter, as it is: groups whose written scores are all right or all wrong are left out (Table 6), although
their REAL rewards may differ. A written score is right when it is the label nearest to y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Group
from real_openrlhf.common.errors import RunError
from real_openrlhf.controller.rollout_stats import group_accuracy
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import StreamExhausted

Keep = Literal["partial", "some_right", "some_wrong", "all"]

# A refill draws (missing groups) / (share that was kept in this step so far) prompts; a lower share counts as this one.
LOWEST_RATE = 0.25


class CannotFill(RunError):
    """The data did not give enough groups to train on."""


class PromptSource(Protocol):
    def take(self, n: int) -> list[Prompt]: ...

    def put_back(self, prompts: Sequence[Prompt]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Collected:
    """
    kept     the batch
    sampled  every group that was generated, for statistics
    waves    calls of the engines that it took
    """

    kept: list[Group]
    sampled: list[Group] = field(repr=False)
    waves: int

    @property
    def pass_rate(self) -> float:
        return len(self.kept) / len(self.sampled) if self.sampled else 0.0


def keeps(keep: Keep, accuracy: float) -> bool:
    """Whether a group of this accuracy is trained on."""
    if keep == "partial":
        return 0.0 < accuracy < 1.0
    if keep == "some_right":
        return accuracy > 0.0
    if keep == "some_wrong":
        return accuracy < 1.0
    return True


def collect(
    source: PromptSource,
    generate: Callable[[Sequence[Prompt]], list[Group]],
    scale: ScoreScale,
    *,
    batch_size: int,
    multiple_of: int,
    keep: Keep,
    refill: bool,
    max_refills: int,
) -> Collected:
    """Groups for one step.

    With refill, prompts are drawn until batch_size groups are kept. Rollouts of groups beyond that are dropped,
    and their prompts go back to the source, to be sampled again by newer weights.
    Without refill, the batch is what is kept of one wave, shortened to a multiple of `multiple_of` (ranks).
    Raises CannotFill when max_refills further waves were not enough, or nothing was kept. When the source has too
    few prompts for a wave, every prompt of the step goes back before StreamExhausted is raised.
    """
    prompts_of: dict[int, Prompt] = {}
    kept: list[Group] = []
    sampled: list[Group] = []
    waves = 0
    wanted = batch_size
    while True:
        try:
            prompts = source.take(wanted)
        except StreamExhausted:
            source.put_back([prompts_of[id(group)] for group in sampled])
            raise
        groups = generate(prompts)
        if [group.row for group in groups] != [prompt.row for prompt in prompts]:
            raise RuntimeError(f"{len(prompts)} prompts were sent, {len(groups)} groups came back, or in another order")
        waves += 1
        for prompt, group in zip(prompts, groups):
            prompts_of[id(group)] = prompt
            if keeps(keep, group_accuracy(group, scale)):
                kept.append(group)
        sampled += groups
        if len(kept) >= batch_size or not refill:
            break
        if waves > max_refills:
            raise CannotFill(_explain(kept, sampled, batch_size, keep, waves, scale))
        rate = max(len(kept) / len(sampled), LOWEST_RATE)
        wanted = min(batch_size, math.ceil((batch_size - len(kept)) / rate))
    size = batch_size if len(kept) >= batch_size else len(kept) // multiple_of * multiple_of
    if size == 0:
        raise CannotFill(_explain(kept, sampled, batch_size, keep, waves, scale))
    source.put_back([prompts_of[id(group)] for group in kept[size:]])
    return Collected(kept=kept[:size], sampled=sampled, waves=waves)


def _explain(
    kept: Sequence[Group], sampled: Sequence[Group], batch_size: int, keep: Keep, waves: int, scale: ScoreScale
) -> str:
    shares = [group_accuracy(group, scale) for group in sampled]
    wrong, right = sum(a == 0 for a in shares), sum(a == 1 for a in shares)
    return (
        f"dynamic sampling kept {len(kept)} of {len(sampled)} groups in {waves} generation waves, {batch_size} are "
        f"needed: {wrong} groups have no right rollout, {right} have only right ones (--real.keep_groups {keep}). "
        "Train on more of them (--real.keep_groups all, some_right or some_wrong), allow more waves "
        "(--real.max_refills), sample more rollouts per prompt, or start from a model that already scores."
    )
