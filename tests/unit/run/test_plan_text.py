"""The plan as text, for scales and devices that need no model."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from real_openrlhf.algo.bound_scale import BoundAnchor, BoundScale
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.device import Device
from real_openrlhf.config.batch_plan import BatchPlan, batch_plan
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.run.plan_text import render

SMALL = {"rollout.batch_size": 8, "rollout.n_samples_per_prompt": 4, "train.micro_batch_size": 2}


def rendered(
    config: Config,
    batch: BatchPlan,
    bound: BoundScale,
    placement: Sequence[str] = (),
    *,
    device: str,
    dtype: str,
    reward_tolerance: float,
    decode: Callable[[int], str] = str,
    warnings: Sequence[str] = (),
) -> str:
    tokenizer = SimpleNamespace(decode=lambda ids, **kwargs: "".join(map(decode, ids)))
    plan: Any = SimpleNamespace(
        config=config,
        batch=batch,
        inputs=SimpleNamespace(
            assumed_gpus=None,
            bound=bound,
            tokenizer=tokenizer,
            given=None,
            train_set=SimpleNamespace(prompts=[Prompt(token_ids=(13, 12), label=2.5, row=0, text="")]),
            template=PromptTemplate(),
        ),
        placement=placement,
        device=Device(name=device, dtype_name=dtype),
        reward_tolerance=reward_tolerance,
        forecast=None,
        warnings=warnings,
    )
    return render(plan)


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
    text = rendered(
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
        First prompt
          2 tokens, without a chat template, human score 2.5:
           3 2
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


def test_text_without_evaluation_overrides_or_warnings() -> None:
    config = parse_args(["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d.jsonl"])
    anchor = BoundAnchor(text="Score: ", prefix="Score:", labels=((11,), (12,)))
    bound = BoundScale(ScoreScale.parse("0,1"), (anchor,))
    text = rendered(config, batch_plan(config, 300), bound, device="cuda", dtype="bf16", reward_tolerance=0.1)
    assert "exact, nothing overridden" in text
    assert "no evaluation" in text
    assert "Warnings" not in text


def test_labels_of_several_tokens_in_the_plan() -> None:
    config = parse_args(["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d.jsonl"])
    anchor = BoundAnchor(text="Score: ", prefix="Score:", labels=((11,), (12,), (11, 13)))
    bound = BoundScale(ScoreScale.parse("1,2,10"), (anchor,))
    text = rendered(
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
