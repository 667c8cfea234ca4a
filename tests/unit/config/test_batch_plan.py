from __future__ import annotations

import textwrap

import pytest

from real_openrlhf.algo.bound_scale import BoundAnchor, BoundScale
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.config.batch_plan import batch_plan, render_plan, resolve_ratio
from real_openrlhf.config.cli import parse_args
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


def test_text_of_the_plan() -> None:
    given = {
        "actor.model_name_or_path": "m",
        "data.prompt_dataset": "d.jsonl",
        "rollout.batch_size": "8",
        "rollout.n_samples_per_prompt": "4",
        "train.micro_batch_size": "2",
        "eval.dataset": "e.jsonl",
        "real.scale": "1-3",
        "real.beta": "0.5",
    }
    config = parse_args(["--dry_run", *(f"--{name}={value}" for name, value in given.items())])
    anchor = BoundAnchor(text="Score: ", prefix="Score:", labels=((11,), (12,), (13,)))
    text = render_plan(
        config,
        batch_plan(config, 100),
        BoundScale(ScoreScale.parse("1-3"), (anchor,)),
        ["node 0: policy rank 0"],
        device="cpu",
        dtype="fp32",
        reward_tolerance=1e-6,
        decode=lambda token: f" {token - 10}",
        warnings=["mind this"],
    )
    assert text == textwrap.dedent("""\
        Model
          m, fp32 on cpu, ZeRO 2
          prompts: d.jsonl; output: none
        Placement
          node 0: policy rank 0
        Batch
          8 prompts x 4 rollouts = 32 rollouts per step
          1 update(s) per step (1 x 1 epoch(s)) of 32 rollouts; ratio: on_policy
          32 rollouts per update and rank, 1 rank(s); up to 2 rollouts and 16192 tokens per forward pass
          up to 2048 prompt and 1024 response tokens
          dynamic sampling: partial, refilled up to 10 times
          rewards of one prompt that differ by less than 1e-06 count as equal
        Steps
          100 prompts x 1 episode(s): at most 12 steps, at most 12 updates
          evaluation before training, every 10 steps, and at the end
        Score tokens
          after 'Score:' (anchor 'Score: '):
            '1' (value 1) -> token 11 ' 1'
            '2' (value 2) -> token 12 ' 2'
            '3' (value 3) -> token 13 ' 3'
        Preset
          exact
          --rollout.batch_size 8 (preset: 256)
          --rollout.n_samples_per_prompt 4 (preset: 16)
          --real.beta 0.5 (preset: 1.0)
        Warnings
          mind this""")


def test_text_without_placement_decoder_or_overrides() -> None:
    config = parse_args(["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d.jsonl"])
    anchor = BoundAnchor(text="Score: ", prefix="Score:", labels=((11,), (12,)))
    bound = BoundScale(ScoreScale.parse("0,1"), (anchor,))
    text = render_plan(config, batch_plan(config, 300), bound, device="cuda", dtype="bf16", reward_tolerance=0.1)
    assert "exact, nothing overridden" in text
    assert "policy: 1 node(s) x 1 rank(s)" in text
    assert "no evaluation" in text
    assert "Warnings" not in text


def test_labels_of_several_tokens_in_the_plan() -> None:
    config = parse_args(["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d.jsonl"])
    anchor = BoundAnchor(text="Score: ", prefix="Score:", labels=((11,), (12,), (11, 13)))
    bound = BoundScale(ScoreScale.parse("1,2,10"), (anchor,))
    text = render_plan(
        config,
        batch_plan(config, 300),
        bound,
        device="cuda",
        dtype="bf16",
        reward_tolerance=0.1,
        decode=lambda i: f"<{i}>",
    )
    assert "'2' (value 2) -> token 12 '<12>'" in text
    assert "'10' (value 10) -> tokens 11 '<11>', 13 '<13>'" in text
    assert "up to 1 more sequence(s) per rollout" in text
    assert "up to 2047 prompt and 1024 response tokens" in text  # room for the label written by force
