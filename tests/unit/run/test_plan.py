"""The plan of a run: what it holds, what it says, and when it is known."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from real_openrlhf.common.device import DeviceError
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.run.assumed_gpus import AssumedGpus
from real_openrlhf.run.plan import make_plan
from real_openrlhf.run.plan_text import render
from real_openrlhf.run.ray_session import Session
from real_openrlhf.run.start import on_cluster
from tests.helpers.run_inputs import inputs_of
from tests.helpers.tiny_judge import make_tokenizer


def test_the_plan_says_what_a_run_would_do(flags: list[str]) -> None:
    more = ["--real.beta", "0.1", "--actor.num_gpus_per_node", "2", "--eval.engine", "own", "--eval.steps", "3"]
    inputs = inputs_of(flags, *more)
    text = render(make_plan(inputs))
    token = inputs.tokenizer.convert_tokens_to_ids("3")
    for piece in (
        "fp32 on cpu, ZeRO 2",
        "policy: 2 x (1 CPU), PACK",
        "rollout: 1 x (1 CPU), PACK",
        "evaluator: 1 x (1 CPU), PACK",
        "8 prompts x 4 rollouts = 32 rollouts per step",
        "16 rollouts per update and rank, 2 rank(s); up to 4 rollouts and 16192 tokens per forward pass",
        "up to 24 prompt and 8 response tokens",
        "dynamic sampling: partial, refilled up to 10 times",
        "40 prompts x 1 episode(s): at most 5 steps, at most 5 updates",
        "evaluation before training, every 3 steps, and at the end",
        "after 'score' (anchor 'score '):",
        f"'3' (value 3) -> token {token} '3'",
        "--real.beta 0.1 (preset: 1.0)",
    ):
        assert piece in text, piece
    assert "Warnings" not in text and "LoRA" not in text and "KL" not in text


@pytest.mark.parametrize(
    ("lora", "pieces"),
    [
        ((), ["KL: weight 0.1, estimator k3; reference: 2 separate rank(s)", "reference: 2 x (1 CPU), PACK"]),
        (
            ("--ds.lora.rank", "8"),
            [
                "LoRA adapters: rank 8, alpha 16, beside all-linear",
                "KL: weight 0.1, estimator k3; reference: the policy, adap",
            ],
        ),
    ],
)
def test_the_plan_says_where_the_reference_is(flags: list[str], lora: tuple[str, ...], pieces: list[str]) -> None:
    config = parse_args([*flags, "--algo.kl.init_coef", "0.1", "--ref.num_gpus_per_node", "2", *lora])
    text = render(make_plan(replace(inputs_of(flags), config=config)))
    assert [piece for piece in pieces if piece not in text] == []


def test_the_plan_shows_warnings(flags: list[str]) -> None:
    text = render(make_plan(inputs_of(flags, "--actor.adam.lr", "0")))
    assert text.splitlines()[-2:] == ["Warnings", "  --actor.adam.lr 0: nothing is learned"]


def test_the_plan_for_a_cluster_with_gpus(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="no GPU"):
        inputs_of(flags, "--real.device", "cuda")
    # A head node without GPUs believes what is asked for, until the cluster is joined.
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    inputs = inputs_of(flags, "--real.device", "cuda")
    text = render(make_plan(inputs))
    assert "bf16 on cuda" in text and "policy: 1 x (1 CPU, 1 GPU), PACK" in text
    assert make_plan(inputs, cluster_gpus=8).device.is_cuda
    with pytest.raises(DeviceError, match="no GPU"):
        make_plan(inputs, cluster_gpus=0)


def test_a_cluster_decides_what_auto_is(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    inputs = inputs_of([*flags, "--real.device", "auto"])
    assert inputs.device is None
    assert make_plan(inputs, cluster_gpus=0).device.name == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert make_plan(inputs, cluster_gpus=8).placement[0].bundles == ({"GPU": 1.0, "CPU": 1.0},)


def test_checks_that_depend_on_the_device_wait_for_the_cluster(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    inputs = inputs_of([*flags, "--real.device", "auto"], "--vllm.tensor_parallel_size", "2")
    with pytest.raises(ConfigError, match="needs GPUs"):
        make_plan(inputs, cluster_gpus=0)


def test_the_plan_holds_what_the_start_takes(flags: list[str]) -> None:
    plan = make_plan(inputs_of(flags, "--eval.engine", "own", "--algo.kl.init_coef", "0.1"))
    assert [request.name for request in plan.placement] == ["policy", "rollout", "reference", "evaluator"]
    assert plan.needed_cpus == 4 == sum(len(request.bundles) for request in plan.placement)
    assert plan.reference is not None and plan.evaluator is not None and plan.evaluator_engine == plan.engine
    assert plan.batch.total_steps == plan.controller.total_steps == plan.policy.max_steps == 5
    assert plan.identity is plan.identity and plan.model_folder.name == "model"
    plain = make_plan(inputs_of(flags))
    assert plain.reference is None and plain.evaluator_engine is None and plain.evaluator is not None


def test_every_warning_is_shown_once(flags: list[str]) -> None:
    inputs = inputs_of(flags, "--actor.adam.lr", "0")
    assert make_plan(inputs, cluster_gpus=0).warnings == ("--actor.adam.lr 0: nothing is learned",)


def test_gpus_that_are_not_here(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--real.device", "auto", "--dry_run", "--actor.num_gpus_per_node", "4", "--vllm.num_engines", "2"]
    wide = ["--vllm.tensor_parallel_size", "2"]
    plan = make_plan(inputs_of(flags, *more, *wide, "--assume_gpus", "8x80GB"))
    text = render(plan)
    assert "bf16 on cuda" in text and "on GPUs that are not here: 1 node(s) x 8 GPU(s) of 80 GB" in text
    with pytest.raises(ConfigError, match=r"--assume_gpus: 1 node\(s\) x 7 GPU\(s\).*8 GPU asked for.*has 7"):
        make_plan(inputs_of(flags, *more, *wide, "--assume_gpus", "7x80GB"))
    assert plan.warnings == ()
    # Two engines of two GPUs on nodes of three: there is room for both, and for four ranks, but not on one node.
    (warning,) = make_plan(inputs_of(flags, *more, *wide, "--assume_gpus", "4x3x80GB")).warnings
    assert "no such room" in warning and "policy: 4 x (1 CPU, 1 GPU), PACK, all on one node where" in warning
    with pytest.raises(ConfigError, match="no node can hold the 2 bundles of an engine"):
        make_plan(inputs_of(flags, *more, *wide, "--assume_gpus", "8x1x80GB"))
    with pytest.raises(ConfigError, match=r"an engine has .* of weights"):
        make_plan(inputs_of(flags, *more, "--assume_gpus", "8x0.000001GB", "--vllm.gpu_memory_utilization", "1"))
    with pytest.raises(ConfigError, match="with nodes 2x8x80GB"):
        make_plan(inputs_of(flags, *more, "--assume_gpus", "eight"))
    with pytest.raises(ConfigError, match="add --dry_run"):
        inputs_of(flags, "--assume_gpus", "8x80GB")


def test_a_chat_template_that_is_left_out_is_a_warning(flags: list[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=1).save_pretrained(tmp_path)
    (warning,) = make_plan(inputs_of(flags, "--actor.model_name_or_path", str(tmp_path))).warnings
    assert "has a chat template" in warning and "--data.apply_chat_template" in warning


def test_the_dry_run_shows_a_prompt_and_the_log_does_not(flags: list[str]) -> None:
    plan = make_plan(inputs_of(flags, "--actor.adam.lr", "0"))
    first = plan.inputs.train_set.prompts[0]
    shown = render(plan)
    assert f"{len(first.token_ids)} tokens, without a chat template, human score {first.label:g}:" in shown
    logged = render(plan, for_log=True)
    assert "First prompt" not in logged and "Warnings" not in logged and "Placement" in logged


def test_warnings_that_only_the_cluster_brings_are_logged(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    more = ["--real.device", "auto", "--ds.adam_offload", "--actor.adam.lr", "0"]
    inputs = inputs_of([*flags, *more])
    plan = replace(make_plan(inputs), warnings=inputs.warnings)
    session = Session(owned=False, address="head:6379", nodes=1, cpus=8.0, gpus=0.0)
    with caplog.at_level(logging.WARNING):
        assert on_cluster(plan, session).device.name == "cpu"
    assert [m for m in caplog.messages if m.startswith("--")] == [
        next(w for w in make_plan(inputs, cluster_gpus=0).warnings if "adam_offload" in w)
    ]
    assert on_cluster(plan, replace(session, owned=True)) is plan


def test_gigabytes_of_both_kinds() -> None:
    assert AssumedGpus.parse("2x8x80GB").memory == 80 * 10**9
    assert AssumedGpus.parse("1x79.5gib").memory == round(79.5 * 2**30)
