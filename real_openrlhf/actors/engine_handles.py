"""Engine handles as something that generates groups. Imports no vLLM, so that any actor can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from real_openrlhf.actors.protocols import Sampling
from real_openrlhf.algo.types import Group
from real_openrlhf.data.prompt import Prompt


def generate_on(engines: Sequence[Any], prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    """Prompts over engine handles in contiguous shares of equal size (to one), results in order."""
    bounds = [round(i * len(prompts) / len(engines)) for i in range(len(engines) + 1)]
    refs = [
        engine.generate.remote(list(prompts[a:b]), sampling)
        for engine, a, b in zip(engines, bounds, bounds[1:])
        if a < b
    ]
    return [group for share in ray.get(refs) for group in share]


class EngineHandles:
    """Given to the evaluator: the engines it borrows, or its own."""

    def __init__(self, engines: Sequence[Any]) -> None:
        self.engines = list(engines)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return generate_on(self.engines, prompts, sampling)
