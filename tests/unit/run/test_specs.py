"""From a configuration to objective, loss, controller settings, specs and the printed plan."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from real_openrlhf.actors.engine.spec import EngineSpecError
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.types import GroupScores
from real_openrlhf.common.device import Device
from real_openrlhf.config.batch_plan import batch_plan
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config, LoraConfig
from real_openrlhf.run.early import check_samplings
from real_openrlhf.run.placement import Request
from real_openrlhf.run.specs import (
    controller_settings,
    engine_spec,
    evaluator_spec,
    loss_options,
    objective_of,
    placement_requests,
    policy_spec,
    probe_sequences,
    reference_spec,
)
from tests.helpers.run_inputs import inputs_of

CPU = Device(name="cpu", dtype_name="fp32")
CUDA = Device(name="cuda", dtype_name="bf16")


def config_of(*flags: str) -> Config:
    return parse_args(
        ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--ckpt.output_dir", "out", *flags]
    )


# -- objective and loss ----------------------------------------------------------------------------------


def test_the_presets_objectives() -> None:
    common: dict[str, Any] = dict(lam=1.0, standardise=True, clip=1.0, tolerance=1e-6, invalid_penalty=0.0)
    paper = RealObjective(beta=0.01, answer_reward="logprob", renormalise=False, **common)
    reference = RealObjective(beta=0.0, answer_reward="prob", renormalise=False, **common)
    exact = replace(paper, beta=1.0)
    assert objective_of(config_of("--real.preset", "paper"), CPU) == paper
    assert objective_of(config_of(), CPU) == objective_of(config_of("--real.preset", "exact"), CPU) == exact
    assert objective_of(config_of(), CUDA) == replace(exact, tolerance=0.1)
    assert objective_of(config_of("--real.preset", "reference"), CPU) == reference


def test_every_setting_of_the_objective_arrives() -> None:
    flags = "--real.lam 2 --real.beta 0.5 --no-real.standardise --real.advantage_clip none --real.tolerance 0.01"
    flags += " --real.invalid_penalty 3 --real.renormalise --real.answer_reward prob"
    assert objective_of(config_of(*flags.split()), CUDA) == RealObjective(
        lam=2.0,
        beta=0.5,
        answer_reward="prob",
        standardise=False,
        clip=None,
        tolerance=0.01,
        invalid_penalty=3.0,
        renormalise=True,
    )


def test_the_papers_reward_on_numbers() -> None:
    scale = config_of().real.score_scale
    probs = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0.0, 0.0, 0.5, 0.5, 0.0]])
    scores = GroupScores(
        values=scale.tensor(),
        label_logprobs=probs.log(),
        readable=torch.tensor([True, True]),
        sampled=torch.tensor([2, 3]),
        target=scale.target(3),
    )
    result = objective_of(config_of("--real.preset", "paper"), CPU)(scores)
    assert result.rewards.tolist() == pytest.approx([math.log(0.4), -0.25 + math.log(0.5)], rel=1e-5)
    assert result.squared_error.tolist() == [0.01, 0.01] and result.likelihood.tolist() == [0.01, 0.01]


def test_the_presets_losses() -> None:
    assert loss_options(config_of()) == LossOptions(aggregation="token_sum", ratio="on_policy")
    assert loss_options(config_of("--real.preset", "reference")) == LossOptions(aggregation="token_mean", ratio="none")


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        ("--train.max_epochs 2", {"ratio": "clip"}),
        ("--real.mini_batches 2", {"ratio": "clip"}),
        ("--real.mini_batches 2 --real.ratio none", {"ratio": "none"}),
        ("--train.async_enable", {"ratio": "clip"}),
        ("--train.async_enable --algo.advantage.is_correction_level token", {"ratio": "on_policy", "tis_cap": 2.0}),
        (
            "--train.async_enable --algo.advantage.is_correction_level token --real.mini_batches 2",
            {"ratio": "clip", "tis_cap": 2.0},
        ),
        ("--real.ratio clip --actor.eps_clip 0.1", {"ratio": "clip", "clip_low": 0.1, "clip_high": 0.1}),
        ("--actor.eps_clip_low_high 0.1 0.3", {"clip_low": 0.1, "clip_high": 0.3}),
        ("--algo.advantage.is_correction_threshold 3", {}),
        (
            "--algo.advantage.is_correction_level token --algo.advantage.is_correction_threshold 3",
            {"tis_cap": 3.0},
        ),
        ("--algo.kl.init_coef 0.1 --algo.kl.estimator k1", {"kl_coef": 0.1, "kl_estimator": "k1"}),
        ("--actor.entropy_coef 0.01", {"entropy_coef": 0.01}),
        ("--actor.entropy_coef 0", {"entropy_coef": 0.0}),
        ("--real.renormalise --real.aggregation token_mean", {"renormalise": True, "aggregation": "token_mean"}),
    ],
)
def test_every_setting_of_the_loss_arrives(flags: str, change: dict[str, Any]) -> None:
    base = LossOptions(aggregation="token_sum", ratio="on_policy")
    assert loss_options(config_of(*flags.split())) == replace(base, **change)


# -- controller, engines, evaluator ----------------------------------------------------------------------


def test_controller_settings_of_the_presets() -> None:
    for preset, refill, top_p in (("paper", True, 1.0), ("reference", False, 0.9)):
        config = config_of("--real.preset", preset, "--actor.num_gpus_per_node", "4", "--train.seed", "7")
        settings = controller_settings(config, batch_plan(config, 1000))
        assert (settings.total_steps, settings.batch_size, settings.share_by) == (3, 256, 4)
        assert settings.sampling == Sampling(n=16, temperature=1.0, top_p=top_p, max_new_tokens=1024)
        assert (settings.keep, settings.refill, settings.max_refills) == ("partial", refill, 10)
        assert (settings.eval_steps, settings.seed, settings.seeded) == (10, 7, False)
        assert (settings.min_mass, settings.min_readable, settings.dead_steps) == (0.5, 0.25, 20)


def test_controller_settings_follow_their_flags() -> None:
    flags = "--train.max_steps 2 --train.full_determinism_enable --real.keep_groups all --real.min_mass 0.5 "
    flags += "--real.min_readable 0.25 --real.dead_steps 0 --eval.steps -1 --logger.samples 9 --logger.logging_steps 3 "
    flags += "--real.renormalise --real.max_refills 4"
    config = config_of(*flags.split())
    settings = controller_settings(config, batch_plan(config, 1000))
    got = {name: getattr(settings, name) for name in ("total_steps", "seeded", "keep", "refill", "max_refills")}
    assert got == {"total_steps": 2, "seeded": True, "keep": "all", "refill": False, "max_refills": 4}
    assert (settings.min_mass, settings.min_readable, settings.dead_steps) == (0.5, 0.25, 0)
    assert (settings.eval_steps, settings.n_samples, settings.logging_steps) == (-1, 9, 3)
    assert settings.renormalise and not settings.eval_beside
    own = config_of("--eval.dataset", "e", "--eval.engine", "own")
    assert controller_settings(own, batch_plan(own, 1000)).eval_beside


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--real.preset reference --eval.dataset e",
        "--rollout.temperature 0.7",
        "--rollout.temperature 0.7 --eval.dataset e --eval.temperature 0.7",
        "--eval.dataset e --eval.temperature 0 --eval.top_p 0.9",
        "--rollout.temperature 0.7 --eval.top_p 0.9",  # no evaluation: its flags do not count
    ],
)
def test_samplings_that_the_engines_can_answer(flags: str) -> None:
    check_samplings(config_of(*flags.split()))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--rollout.temperature 0.7 --rollout.top_p 0.9",
            "--rollout.temperature, --rollout.top_p: .*0.7 with top_p 0.9",
        ),
        ("--rollout.temperature 0.001", "--rollout.temperature.*at least 0.01, got 0.001"),
        (
            "--eval.dataset e --eval.temperature 0.7",
            "--eval.temperature 0.7 .* --rollout.temperature 1: .*raw_logprobs",
        ),
        (
            "--rollout.temperature 0.7 --eval.dataset e --eval.top_p 0.9",
            "--eval.top_p 0.9 cannot be combined with --rollout.temperature 0.7: .*use top_p 1",
        ),
    ],
)
def test_samplings_that_no_engine_can_answer(flags: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_samplings(config_of(*flags.split()))


def test_engine_and_evaluator_specs(flags: list[str]) -> None:
    inputs = inputs_of(flags, "--eval.n_samples_per_prompt", "3", "--eval.seed", "9", "--rollout.temperature", "0.5")
    inputs = replace(inputs, config=parse_args([*flags, "--rollout.temperature", "0.5", "--vllm.num_engines", "2"]))
    spec = engine_spec(inputs, CPU)
    assert spec.load_format == "dummy" and spec.logprobs_mode == "processed_logprobs" and spec.enforce_eager
    assert spec.max_model_len == 32 and spec.seed == 42 and spec.device == CPU
    assert not engine_spec(inputs, CUDA).enforce_eager
    assert engine_spec(inputs_of(flags), CPU).logprobs_mode == "raw_logprobs"


def test_the_evaluator_uses_its_own_flags(flags: list[str]) -> None:
    inputs = inputs_of(flags, "--eval.n_samples_per_prompt", "3", "--eval.seed", "9", "--eval.top_p", "0.8")
    spec = evaluator_spec(inputs)
    assert spec.sampling == Sampling(n=3, temperature=1.0, top_p=0.8, max_new_tokens=8, seed=9)
    (benchmark,) = spec.benchmarks
    assert len(benchmark.prompts) == 6 and str(spec.reader.bound.scale) == "1,2,3,4,5"
    assert not spec.force and not spec.plots
    asked = evaluator_spec(inputs_of(flags, "--eval.force_anchor", "--logger.wandb.mode", "offline"))
    assert asked.force and asked.plots


def test_probes_are_the_ends_of_the_first_prompts(flags: list[str]) -> None:
    inputs = inputs_of(flags, "--sync.check_sequences", "3", "--sync.check_tokens", "2")
    assert probe_sequences(inputs) == tuple(p.token_ids[-2:] for p in inputs.train_set.prompts[:3])
    whole = probe_sequences(inputs_of(flags, "--sync.check_sequences", "99"))
    assert whole == tuple(p.token_ids for p in inputs.train_set.prompts)


@pytest.mark.parametrize(
    ("more", "sizes"),
    [
        ("", {"policy": 1, "rollout": 1}),
        ("--actor.num_nodes 2 --actor.num_gpus_per_node 4 --vllm.num_engines 3", {"policy": 8, "rollout": 3}),
        ("--eval.dataset e --eval.engine own", {"policy": 1, "rollout": 1, "evaluator": 1}),
        ("--algo.kl.init_coef 0.1", {"policy": 1, "rollout": 1, "reference": 1}),
        (
            "--algo.kl.init_coef 0.1 --ref.num_nodes 2 --ref.num_gpus_per_node 4",
            {"policy": 1, "rollout": 1, "reference": 8},
        ),
        ("--algo.kl.init_coef 0.1 --ref.num_gpus_per_node 4 --ds.lora.rank 8", {"policy": 1, "rollout": 1}),
        ("--ref.num_gpus_per_node 4", {"policy": 1, "rollout": 1}),
        (
            "--vllm.num_engines 2 --vllm.tensor_parallel_size 2 --eval.dataset e --eval.engine own",
            {"policy": 1, "rollout": 4, "evaluator": 2},
        ),
    ],
)
def test_placement(more: str, sizes: dict[str, int]) -> None:
    for device, bundle in ((CPU, {"CPU": 1.0}), (CUDA, {"GPU": 1.0, "CPU": 1.0})):
        got = placement_requests(config_of(*more.split()), device)
        width = 2 if "tensor_parallel_size 2" in more else None
        per_node = {
            "policy": 4 if "--actor.num_gpus_per_node 4" in more else 1,
            "reference": 4 if "--ref.num_gpus_per_node 4" in more else 1,
        }
        assert got == [
            Request(
                name=name,
                bundles=(bundle,) * n,
                width=width if name in ("rollout", "evaluator") else None,
                per_node=per_node.get(name),
            )
            for name, n in sizes.items()
        ]


def test_batches_are_shared_by_policy_and_reference_ranks() -> None:
    config = config_of("--actor.num_gpus_per_node", "4", "--algo.kl.init_coef", "1", "--ref.num_gpus_per_node", "6")
    assert controller_settings(config, batch_plan(config, 1000)).share_by == 12


def test_the_references_spec_is_the_policys_without_adapters(flags: list[str]) -> None:
    more = ("--algo.kl.init_coef", "0.1", "--ref.num_gpus_per_node", "2", "--actor.num_gpus_per_node", "4")
    inputs = inputs_of(flags, *more)
    policy = policy_spec(inputs, batch_plan(inputs.config, 40), CPU)
    spec = reference_spec(policy, inputs.config)
    assert (policy.ranks_per_node, spec.ranks_per_node) == (4, 2) and spec.path == policy.path
    assert policy.options.kl_coef == 0.1 and policy.lora.rank == spec.lora.rank == 0


def test_every_setting_of_lora_arrives(flags: list[str]) -> None:
    inputs = inputs_of(flags)
    assert policy_spec(inputs, batch_plan(inputs.config, 40), CPU).lora.rank == 0
    more = "--ds.lora.rank 8 --ds.lora.alpha 4 --ds.lora.dropout 0.1 --ds.lora.target_modules q_proj v_proj"
    inputs = replace(inputs, config=parse_args([*flags, *more.split(), "--train.seed", "7"]))
    spec = policy_spec(inputs, batch_plan(inputs.config, 40), CPU)
    assert spec.lora == LoraConfig(rank=8, alpha=4, target_modules=("q_proj", "v_proj"), dropout=0.1)
    assert spec.seed == 7
    assert reference_spec(spec, inputs.config).lora.rank == 0


def test_colocated_policy_and_engines_share_their_bundles() -> None:
    flags = "--train.colocate_all --actor.num_gpus_per_node 4 --vllm.num_engines 2 --vllm.tensor_parallel_size 2"
    config = config_of(*flags.split(), "--eval.dataset", "e", "--eval.engine", "own")
    gpu = {"GPU": 1.0, "CPU": 1.0}
    assert placement_requests(config, CUDA) == [
        Request(name="policy+rollout", bundles=(gpu,) * 4, width=2, per_node=4),
        Request(name="evaluator", bundles=(gpu,) * 2, width=2),
    ]
    narrow = config_of("--train.colocate_all", "--actor.num_gpus_per_node", "4", "--vllm.num_engines", "4")
    assert placement_requests(narrow, CUDA) == [Request(name="policy+rollout", bundles=(gpu,) * 4, per_node=4)]


def test_sleep_and_one_step_ahead_arrive(flags: list[str]) -> None:
    inputs = inputs_of(flags)
    assert not engine_spec(inputs, CUDA).enable_sleep
    sleeping = replace(inputs, config=parse_args([*flags, "--train.colocate_all", "--vllm.enable_sleep"]))
    assert engine_spec(sleeping, CUDA).enable_sleep
    with pytest.raises(EngineSpecError, match="no sleep mode on a CPU"):
        engine_spec(sleeping, CPU)
    for more, ahead in (((), False), (("--train.async_enable",), True)):
        config = config_of(*more)
        assert controller_settings(config, batch_plan(config, 1000)).one_ahead is ahead
