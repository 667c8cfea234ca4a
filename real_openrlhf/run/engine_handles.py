"""Generates groups by Ray handles of engines. Imports no vLLM, so that any actor can use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import Group
from real_openrlhf.data.prompt import Prompt


def generate_on(
    engines: Sequence[Any],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    wait: Callable[[list[Any]], list[Any]] | None = None,
) -> list[Group]:
    """Distribute prompts over engines; results come back in the prompts' order.

    Shares differ by one prompt at most. Prompts are dealt in turn, longest first: so the engines get similar
    work, and only short prompts are left when some engines are already idle. The shares depend on the prompts alone.

    wait: in place of ray.get.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids) - len(prompts[i].given_ids))
    shares = [order[i :: len(engines)] for i in range(min(len(engines), len(prompts)))]
    refs = [engine.generate.remote([prompts[i] for i in share], sampling) for engine, share in zip(engines, shares)]
    found = ray.get(refs) if wait is None else wait(refs)
    groups = zip((i for share in shares for i in share), (group for share in found for group in share))
    return [group for _, group in sorted(groups, key=lambda pair: pair[0])]


class EngineHandles:
    """The engines that the evaluator uses: borrowed rollout engines, or its own."""

    def __init__(self, engines: Sequence[Any]) -> None:
        self.engines = list(engines)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return generate_on(self.engines, prompts, sampling)
