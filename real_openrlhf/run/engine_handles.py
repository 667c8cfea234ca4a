"""Engine handles as something that generates groups. Imports no vLLM, so that any actor can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import Group
from real_openrlhf.data.prompt import Prompt


def generate_on(engines: Sequence[Any], prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    """Prompts over engine handles in shares of equal size (to one), results in the prompts' order.

    Longest prompts first, dealt in turn: the engines get as much work as each other, and what is
    left for the end of the batch, when the others idle, is short. The order depends on the prompts alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids) - len(prompts[i].given_ids))
    shares = [order[i :: len(engines)] for i in range(min(len(engines), len(prompts)))]
    refs = [engine.generate.remote([prompts[i] for i in share], sampling) for engine, share in zip(engines, shares)]
    groups = zip((i for share in shares for i in share), (group for share in ray.get(refs) for group in share))
    return [group for _, group in sorted(groups, key=lambda pair: pair[0])]


class EngineHandles:
    """Given to the evaluator: the engines it borrows, or its own."""

    def __init__(self, engines: Sequence[Any]) -> None:
        self.engines = list(engines)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return generate_on(self.engines, prompts, sampling)
