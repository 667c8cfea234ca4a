"""Named settings: `exact` weighs its terms as the gradient does, `paper` and `reference` as the paper and its authors.

`exact`, the default, is `paper` with beta = 1: both terms have the weight that the product rule gives them. Advantages
are standardised and clipped all the same. With the paper's beta = 0.01 only a hundredth of Term 2 keeps the score
distribution in place while Term 1 changes the network.
Measurements of both are in examples/quickstart/README.md.

A preset overrides the defaults, and all that a user gives overrides the preset; the run records which preset it used
and what was overridden. Beta and the aggregation of Term 1 belong together: under a token sum, beta = 0.01 makes Term 2
weaker by about the length of the chain of thought than under a mean.

`warmup` is that of train_warmup, and of it alone: given responses are learned, with the learning rate and the passes of
the paper's authors.

Not expressed here: the authors cut prompts of more than 2,048 tokens on the left; here a prompt
that does not fit into `--data.max_len` less the response is a bad row.
"""

from __future__ import annotations

from typing import Any

DEFAULT_PRESET = "exact"

# Settings that all presets share.
_COMMON: dict[str, Any] = {
    "real.objective": "real",
    "real.lam": 1.0,
    "real.standardise": True,
    "real.advantage_clip": 1.0,
    "real.renormalise": False,
    "real.keep_groups": "partial",
    "rollout.batch_size": 256,
    "rollout.n_samples_per_prompt": 16,
    "rollout.max_new_tokens": 1024,
    "rollout.temperature": 1.0,
    "data.max_len": 2048 + 1024,
    "train.batch_size": None,
    "actor.adam.lr": 1e-6,
    "actor.adam.weight_decay": 0.1,
    "actor.lr_scheduler": "constant",
    "actor.lr_warmup_ratio": 0.0,
    "actor.max_norm": 1.0,
    "algo.kl.init_coef": 0.0,
    "algo.advantage.is_correction_level": "off",
    "eval.steps": 10,
    "eval.temperature": 1.0,
    "eval.n_samples_per_prompt": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **_COMMON,
        "real.beta": 0.01,
        "real.aggregation": "token_sum",
        "real.answer_reward": "logprob",
        "real.ratio": "auto",
        "real.mini_batches": 1,
        "real.refill": True,
        "rollout.top_p": 1.0,
        "train.max_epochs": 1,
        "eval.top_p": 1.0,
    },
    "reference": {
        **_COMMON,
        "real.beta": 0.0,
        "real.aggregation": "token_mean",
        "real.answer_reward": "prob",
        "real.ratio": "none",
        "real.mini_batches": 4,
        "real.refill": False,
        "rollout.top_p": 0.9,
        "train.max_epochs": 3,
        "eval.top_p": 0.9,
    },
}
PRESETS["exact"] = {**PRESETS["paper"], "real.beta": 1.0}

WARMUP = "warmup"
_WARMUP: dict[str, Any] = {
    "real.aggregation": "token_mean",
    "real.lam": 1.0,
    "real.renormalise": False,
    "real.keep_groups": "all",
    "real.refill": False,
    "rollout.n_samples_per_prompt": 1,
    "rollout.max_new_tokens": 1024,
    "data.max_len": 2048 + 1024,
    "train.batch_size": 64,
    "train.num_episodes": 3,
    "actor.adam.lr": 1e-5,
    "actor.adam.weight_decay": 0.0,
    "actor.lr_scheduler": "cosine",
    "actor.lr_warmup_ratio": 0.03,
    "actor.max_norm": 1.0,
    "eval.steps": 100,
    "eval.temperature": 1.0,
    "eval.top_p": 1.0,
    "eval.n_samples_per_prompt": 1,
}


def preset_values(name: str) -> dict[str, Any]:
    """The flags that a preset sets. KeyError for an unknown one."""
    return _WARMUP if name == WARMUP else PRESETS[name]
