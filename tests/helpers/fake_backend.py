"""A judge backend that says what a test wrote down: no vLLM, the real reader."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from real_openrlhf.actors.engine.spec import make_rollout, request_seed
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Group
from real_openrlhf.data.prompt import Prompt

# (prompt, sample) -> the text that is generated, and the labels' probabilities at each of its tokens (None: missing).
Script = Callable[[Prompt, int], tuple[str, Sequence[float | None]]]


@dataclass
class FakeBackend:
    """calls: the prompts, the sampling and the seeds of every call."""

    reader: ScoreReader
    tokenizer: Any
    script: Script
    max_model_len: int | None = None
    calls: list[tuple[list[Prompt], Sampling, list[int | None]]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        seeds = [
            None if sampling.seed is None else request_seed(sampling.seed, p.row, k)
            for p in prompts
            for k in range(sampling.n)
        ]
        self.calls.append((list(prompts), sampling, seeds))
        return [
            Group(
                prompt_ids=torch.tensor(prompt.token_ids),
                label=prompt.label,
                rollouts=tuple(self._rollout(prompt, sampling, k) for k in range(sampling.n)),
                row=prompt.row,
                weight_version=0,
            )
            for prompt in prompts
        ]

    def _rollout(self, prompt: Prompt, sampling: Sampling, sample: int):
        text, probabilities = self.script(prompt, sample)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ended = ids[-1:] == [self.tokenizer.eos_token_id]
        ids = ids[: sampling.max_new_tokens]
        row = [math.nan if p is None else math.log(p) for p in probabilities]
        order = self.reader.bound.anchors[0].token_ids
        by_token = dict(zip(order, row))
        columns = [by_token[token] for token in self.reader.bound.read_token_ids]
        flat = [value for _ in ids for value in (-0.5, *columns)]
        finish = "stop" if ended else "length"
        return make_rollout(self.reader, self.reader.bound.read_token_ids, ids, flat, finish, prompt.given_ids)
