"""How responses are sampled, according to the flags."""

from __future__ import annotations

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.config.schema import Config


def rollout_sampling(config: Config) -> Sampling:
    return Sampling(
        n=config.rollout.n_samples_per_prompt,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def evaluation_sampling(config: Config) -> Sampling:
    return Sampling(
        n=config.eval.n_samples_per_prompt,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.eval.seed,
    )
