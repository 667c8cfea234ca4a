"""A reward from text alone: `--reward.remote_url` takes this file, or one that changes its settings.

    from real_openrlhf.dropin.reward import make_reward_func
    from real_openrlhf.dropin.settings import RealSettings

    reward_func = make_reward_func(RealSettings(scale="0-9"))

OpenRLHF hands such a file text, no probabilities. So this is not REAL's reward but that of a baseline: `mse_rl`,
-(v - y)^2 of the score v that was written, or `standard_rl`, 1 where v is right. The agent (agent.py) has the
distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from real_openrlhf.algo.objectives import objective_class
from real_openrlhf.data import response_text
from real_openrlhf.data.template import PromptError
from real_openrlhf.dropin.settings import DropInError, RealSettings

logger = logging.getLogger(__name__)
RewardFunc = Callable[[Sequence[str], Sequence[str], Sequence[Any]], dict[str, Any]]


class _Characters:
    """A tokenizer with one token per character, so that text is read by the very rules that token ids are."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        return "".join(map(chr, token_ids))


def make_reward_func(settings: RealSettings | None = None, objective: str = "mse_rl") -> RewardFunc:
    """OpenRLHF's reward_func(queries, prompts, labels) for these settings; lam and renormalise play no part.

    objective: whose reward; "mse_rl" or "standard_rl", with what they give to a response without a score.
    queries: prompts with their responses, as the tokenizer decodes them, special tokens included.

    It returns {"rewards": [N] float32, "scores": [N] float32, "extra_logs": {...}}; scores is 1 where the written
    score is the nearest to the label, else 0. OpenRLHF only notes errors of reward files at the level INFO and then
    stops for want of a reward model, so they are logged as errors here, and raised.
    """
    settings = settings or RealSettings()
    if objective not in ("mse_rl", "standard_rl"):
        raise DropInError(f"objective must be 'mse_rl' or 'standard_rl', got {objective!r}: others need probabilities")
    reader, scale = settings.reader(_Characters(), ()), settings.score_scale
    rule = objective_class(objective)(invalid_penalty=settings.invalid_penalty)

    def one(query: str, prompt: str, label: Any) -> tuple[float, float, float]:
        target = settings.target(label)
        reading = reader.read(_Characters().encode(response_of(query, prompt), add_special_tokens=False))
        written = -1 if reading.label_index is None else reading.label_index
        # Objectives take groups of at least two: the rollout and its double.
        group = settings.group_scores(torch.zeros(2, len(scale)), torch.tensor([reading.readable] * 2), target)
        reward = rule(replace(group, sampled=torch.tensor([written] * 2))).rewards[0]
        return float(reward), float(scale.is_correct(reading.label_index, target)), float(written >= 0)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        try:
            if not len(queries) == len(prompts) == len(labels):
                raise DropInError(f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels")
            rows = [one(*row) for row in zip(queries, prompts, labels)]
        except ValueError:
            logger.exception("the reward file %s failed (--reward.remote_url, --data.label_key)", __file__)
            raise
        rewards, right, on_scale = torch.tensor(rows, dtype=torch.float32).view(-1, 3).unbind(1)
        return {"rewards": rewards, "scores": right, "extra_logs": {"real_on_scale": on_scale}}

    return reward_func


def response_of(query: str, prompt: str) -> str:
    """See `data.response_text.response_of`. DropInError where the prompt does not stand in the query."""
    try:
        return response_text.response_of(query, prompt)
    except PromptError as error:
        raise DropInError(f"{error}; the agent (--train.agent_func_path) reads token ids and needs no text") from error


reward_func = make_reward_func()
