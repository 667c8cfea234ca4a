"""Which cases are measured, in which order, and what is left out when there is too little time.

Rounds are in the order of their importance. A round is one case, run once by each of its contestants, one after the
other, so that other load on the machine affects all of them. Before a round starts, its cost is estimated again. A
round that does not fit into the remaining time is left out and reported, and the next, cheaper one is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.benchmark.flops import Shape, executed
from examples.benchmark.protocol import CONTESTANTS, Case

REAL, STOCK, AUTHORS = CONTESTANTS
CENTRE = "centre"
# Safety factor on estimates before a round is started.
MARGIN = 1.1
SYNC_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """One case run once by each of `contestants`, in this order.

    point        "centre", or what differs from it, such as "P=256"
    purpose      "time", or "memory": micro-batches of all K rollouts for all contestants
    alone        each contestant runs alone in a fresh process, so that earlier steps do not influence its memory
    plain_micro  rollouts per micro-batch of the contestants with separate rows; this project's is always K
    """

    model: str
    point: str
    contestants: tuple[str, ...]
    prompt: int
    response: int
    samples: int
    plain_micro: int
    purpose: str = "time"
    gradient_checkpointing: bool = False
    alone: bool = False
    repeat: int = 0

    @property
    def name(self) -> str:
        what = self.point if self.purpose == "time" else f"memory {self.point}"
        tail = ", checkpointing" if self.gradient_checkpointing else ""
        who = "" if len(self.contestants) == len(CONTESTANTS) else f" ({', '.join(self.contestants)})"
        return f"{self.model} {what}{tail}, repeat {self.repeat + 1}{who}"

    def case(self, contestant: str) -> Case:
        return Case(
            prompt=self.prompt,
            response=self.response,
            samples=self.samples,
            micro_batch=self.samples if contestant == REAL else min(self.plain_micro, self.samples),
            gradient_checkpointing=self.gradient_checkpointing,
        )


@dataclass(frozen=True, kw_only=True)
class WeightSync:
    """The weight syncs of both sides, timed by a separate program."""

    model: str
    seconds: float = SYNC_SECONDS

    @property
    def name(self) -> str:
        return f"{self.model} weight sync"


Item = Round | WeightSync


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The centre, the factors that are varied around it one at a time, and the rollouts of a plain micro-batch."""

    prompt: int
    response: int
    samples: int
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    few_samples: tuple[int, ...]
    plain_micro: int = 2
    repeats: int = 3

    def centre(self) -> dict[str, int]:
        return {"prompt": self.prompt, "response": self.response, "samples": self.samples}

    def points(self) -> dict[str, dict[str, int]]:
        """The points around the centre, by name."""
        varied = [("prompt", "P", self.prompts), ("response", "R", self.responses), ("samples", "K", self.few_samples)]
        points = {f"{letter}={n}": {**self.centre(), key: n} for key, letter, values in varied for n in values}
        return points


FULL = Sizes(prompt=1024, response=128, samples=16, prompts=(256, 2048, 512), responses=(256, 64), few_samples=(4, 8))
SMALL = Sizes(prompt=512, response=16, samples=8, prompts=(128,), responses=(32,), few_samples=(4,), repeats=3)


def rotated(contestants: Sequence[str], by: int) -> tuple[str, ...]:
    """The contestants in another order, so that who begins changes from repeat to repeat."""
    by %= len(contestants)
    return (*contestants[by:], *contestants[:by])


def _round(model: str, sizes: Mapping[str, int], **more: Any) -> Round:
    """sizes: prompt, response and samples."""
    return Round(model=model, prompt=sizes["prompt"], response=sizes["response"], samples=sizes["samples"], **more)


def centre_rounds(model: str, sizes: Sizes) -> list[Round]:
    return [
        _round(
            model,
            sizes.centre(),
            point=CENTRE,
            contestants=rotated(CONTESTANTS, repeat),
            plain_micro=sizes.plain_micro,
            repeat=repeat,
        )
        for repeat in range(sizes.repeats)
    ]


def varied_rounds(
    model: str, sizes: Sizes, contestants: tuple[str, ...], points: Iterable[str], repeat: int = 0
) -> list[Round]:
    every = sizes.points()
    return [
        _round(
            model,
            every[point],
            point=point,
            contestants=contestants,
            plain_micro=sizes.plain_micro,
            repeat=repeat,
        )
        for point in points
    ]


def memory_round(
    model: str, sizes: Sizes, contestants: tuple[str, ...], samples: int, *, checkpointing: bool, alone: bool
) -> Round:
    return _round(
        model,
        {**sizes.centre(), "samples": samples},
        point=CENTRE if samples == sizes.samples else f"K={samples}",
        contestants=contestants,
        plain_micro=samples,
        purpose="memory",
        gradient_checkpointing=checkpointing,
        alone=alone,
    )


def full_plan(large: str, narrow: str, sizes: Sizes = FULL) -> list[Item]:
    """The most important first."""
    few = sizes.few_samples[0]
    points = list(sizes.points())
    return [
        *centre_rounds(large, sizes),
        WeightSync(model=large),
        memory_round(large, sizes, (REAL, STOCK), sizes.samples, checkpointing=True, alone=True),
        memory_round(large, sizes, CONTESTANTS, few, checkpointing=False, alone=True),
        *centre_rounds(narrow, sizes),
        # Steps of this project alone are cheap: its memory at all points is measured in any case.
        *varied_rounds(narrow, sizes, (REAL,), points),
        memory_round(narrow, sizes, CONTESTANTS, few, checkpointing=False, alone=True),
        *varied_rounds(narrow, sizes, (REAL, STOCK), points, repeat=1),
        *varied_rounds(narrow, sizes, (REAL, AUTHORS), points, repeat=2),
        *varied_rounds(large, sizes, CONTESTANTS, ("K=4", "P=256", "K=8", "R=64")),
        memory_round(large, sizes, (AUTHORS,), sizes.samples, checkpointing=True, alone=True),
    ]


def small_plan(model: str, sizes: Sizes = SMALL) -> list[Item]:
    """A tiny model, all contestants at every point; no process is started only to measure memory."""
    return [
        *centre_rounds(model, sizes),
        memory_round(model, sizes, CONTESTANTS, sizes.few_samples[0], checkpointing=False, alone=False),
        memory_round(model, sizes, CONTESTANTS, sizes.samples, checkpointing=True, alone=False),
        *varied_rounds(model, sizes, CONTESTANTS, sizes.points()),
    ]


@dataclass(kw_only=True)
class Estimates:
    """Estimated seconds of steps and starts, from numbers of operations and from measurements so far.

    shapes  of the models, by name
    rate    operations per second before anything was measured
    start   seconds until a worker is ready and warm, before one was started
    """

    shapes: Mapping[str, Shape]
    rate: float
    start: float = 40.0
    _measured: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    _starts: dict[tuple[str, str], float] = field(default_factory=dict)

    def observe(self, model: str, contestant: str, case: Case, seconds: float) -> None:
        """Record a measured step. The largest so far decides the rate, since small ones are slower per operation."""
        flops = executed(self.shapes[model], contestant, case)
        known = self._measured.get((model, contestant))
        if known is None or flops >= known[0]:
            self._measured[model, contestant] = (flops, flops / seconds)

    def observe_start(self, model: str, contestant: str, seconds: float) -> None:
        self._starts[model, contestant] = seconds

    def step(self, model: str, contestant: str, case: Case) -> float:
        _, rate = self._measured.get((model, contestant), (0, self.rate))
        return executed(self.shapes[model], contestant, case) / rate

    def item(self, item: Item, running: Collection[tuple[str, str]] = ()) -> float:
        """Seconds of an item, with the starts of workers that are not running. running: (model, contestant) each."""
        if isinstance(item, WeightSync):
            return item.seconds
        keys = [(item.model, contestant) for contestant in item.contestants]
        starts = [key for key in keys if item.alone or key not in running]
        return sum(self.step(*key, item.case(key[1])) for key in keys) + sum(
            self._starts.get(key, self.start) for key in starts
        )


def running_after(item: Item) -> set[tuple[str, str]]:
    """The workers (model, contestant) that an item leaves running: those of one model, or none."""
    if isinstance(item, WeightSync) or item.alone:
        return set()
    return {(item.model, contestant) for contestant in item.contestants}


def fit(
    items: Sequence[Item], seconds: float, price: Callable[[Item, Collection[tuple[str, str]]], float]
) -> tuple[list[Item], list[Item]]:
    """(kept, left out): items in their order, kept if they still fit. price: cost of an item, given running workers."""
    kept: list[Item] = []
    dropped: list[Item] = []
    running: set[tuple[str, str]] = set()
    for item in items:
        cost = price(item, running)
        if cost > seconds:
            dropped.append(item)
            continue
        kept.append(item)
        seconds -= cost
        same = {key for key in running if key[0] == item.model}
        running = (same if running_after(item) else set()) | running_after(item)
    return kept, dropped
