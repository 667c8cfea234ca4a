from __future__ import annotations

import pytest

from real_openrlhf.config.batch_plan import batch_plan, resolve_ratio
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.flags import ConfigError

SMALL = {"rollout.batch_size": 8, "rollout.n_samples_per_prompt": 4, "train.micro_batch_size": 2}


def test_one_update() -> None:
    plan = batch_plan(build_config(SMALL), 100)
    assert (plan.samples_per_step, plan.updates_per_step, plan.samples_per_update) == (32, 1, 32)
    assert plan.samples_per_rank == 32
    assert (plan.steps_by_data, plan.total_steps, plan.total_updates) == (12, 12, 12)
    assert plan.at_most


def test_ranks_mini_batches_epochs_episodes() -> None:
    more = {"actor.num_nodes": 2, "actor.num_gpus_per_node": 2, "train.batch_size": 16, "train.max_epochs": 3}
    plan = batch_plan(build_config({**SMALL, **more, "train.num_episodes": 3, "real.refill": False}), 20)
    assert (plan.ranks, plan.updates_per_epoch, plan.updates_per_step) == (4, 2, 6)
    assert plan.samples_per_rank == 4
    # 60 prompts over three episodes: the fourth prompt of step 3 already belongs to the second.
    assert (plan.steps_by_data, plan.total_updates) == (7, 42)
    assert not plan.at_most


def test_max_steps_only_shortens() -> None:
    assert batch_plan(build_config({**SMALL, "train.max_steps": 5}), 100).total_steps == 5
    assert not batch_plan(build_config({**SMALL, "train.max_steps": 5}), 100).at_most
    assert batch_plan(build_config({**SMALL, "train.max_steps": 50}), 100).total_steps == 12


def test_too_few_prompts() -> None:
    with pytest.raises(ConfigError, match=r"7 prompts x --train.num_episodes 1 .* --rollout.batch_size 8"):
        batch_plan(build_config(SMALL), 7)
    assert batch_plan(build_config({**SMALL, "train.num_episodes": 2}), 7).total_steps == 1


@pytest.mark.parametrize(
    ("ratio", "epochs", "expected"),
    [
        ("auto", 1, "on_policy"),
        ("auto", 2, "clip"),
        ("none", 1, "on_policy"),
        ("none", 2, "none"),
        ("clip", 1, "clip"),
        ("clip", 2, "clip"),
    ],
)
def test_ratio(ratio: str, epochs: int, expected: str) -> None:
    assert resolve_ratio(build_config({"real.ratio": ratio, "train.max_epochs": epochs})) == expected
