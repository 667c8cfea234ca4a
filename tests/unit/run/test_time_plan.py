"""Seconds by hand, and what the H100 took for a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from examples.benchmark.flops import needed
from examples.benchmark.protocol import Case
from real_openrlhf.common.cards import RATES, CardRates, rates_of
from real_openrlhf.run import time_plan as module
from real_openrlhf.run.memory import Question, memory_plan
from real_openrlhf.run.model_shape import DecoderShape
from real_openrlhf.run.time_plan import Cluster, TimePlan, policy_flops, rows_per_group, time_plan
from tests.unit.config.test_validate import COLOCATED, config_with
from tests.unit.run.test_activations import H100, measured
from tests.unit.run.test_states import shape_of

B = 10**9
TINY = DecoderShape(vocabulary=100, hidden=8, intermediate=16, layers=2, heads=2, kv_heads=2, head_dim=4)


def asked_of(decoder: DecoderShape | None = TINY, parameters: int = B, **more: Any) -> Question:
    shape = replace(shape_of(parameters), decoder=decoder)
    return Question(**{**dict(shape=shape, itemsize=2, card=80 * B, prompt=100, liger=True), **more})


def planned(changes: dict[str, Any], asked: Question, prompt: float = 100.0, card: str = "H100") -> TimePlan:
    config = config_with(changes)
    engine = memory_plan(config, asked).engine
    plan = time_plan(config, asked, engine, Cluster(card=card, rates=RATES[card]), prompt)
    assert plan is not None
    return plan


def seconds(plan: TimePlan) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in plan.phases}


@pytest.mark.parametrize(("k", "prompt", "response"), [(16, 2048, 512), (4, 100, 30)])
def test_operations_are_those_of_the_benchmark(k: int, prompt: int, response: int) -> None:
    config = config_with(
        {
            "rollout.batch_size": 1,
            "rollout.n_samples_per_prompt": k,
            "rollout.max_new_tokens": response,
            "train.max_tokens_per_gpu": 2**20,
        }
    )
    case = Case(prompt=prompt, response=response, samples=k, micro_batch=k)
    assert 3 * policy_flops(config, asked_of(H100), prompt) == needed(H100, case)


def test_rollouts_that_do_not_go_together_pay_for_their_prompt_again() -> None:
    whole = config_with({"train.max_tokens_per_gpu": 20_000})
    divided = config_with({"train.max_tokens_per_gpu": 6144})  # four responses of 1,024 behind 2,048
    assert rows_per_group(whole, 2048) == 1 and rows_per_group(divided, 2048) == 4
    assert rows_per_group(config_with({"train.micro_batch_size": 8}), 100) == 2
    more = policy_flops(divided, asked_of(), 2048) - policy_flops(whole, asked_of(), 2048)
    assert more == 256 * 3 * TINY.forward(tokens=2048, pairs=2048 * 2049 // 2, logits=0)


@pytest.mark.parametrize(("name", "liger"), [("1.7b", False), ("1.7b with liger", True)])
def test_the_h100s_step(name: str, liger: bool) -> None:
    """The shares were read off these: this holds the arithmetic, not the shares."""
    changes = {"rollout.batch_size": 1, "rollout.max_new_tokens": 512, "train.max_tokens_per_gpu": 2**20}
    plan = planned(changes, asked_of(H100, liger=liger), prompt=2048)
    assert 1000 * seconds(plan)["policy"] == pytest.approx(measured("step")[f"{name}: ms"], rel=0.03)


def test_generation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PASS_SECONDS", 0.5)
    monkeypatch.setattr(module, "BANDWIDTH_SHARE", 0.5)
    rates = CardRates(flops=1e30, bandwidth=4e9, link=1e30)
    config = config_with({"rollout.batch_size": 8, "rollout.max_new_tokens": 10, "vllm.max_num_seqs": 64})
    asked = asked_of()
    plan = time_plan(config, asked, memory_plan(config, asked).engine, Cluster(card="x", rates=rates), 20.0)
    assert plan is not None and plan.at_once == 64
    # 128 rollouts, 64 at a time: 20 passes. Each reads 2e9 of weights and 64 * 25 tokens of 2 * 2 * 2 * 4 * 2 bytes.
    read = 2e9 + 64 * 25 * 64
    assert seconds(plan)["generation"] == pytest.approx(20 * (0.5 + read / 2e9))
    assert plan.phases[0].bound == "memory"


def test_rollouts_at_a_time_are_bounded_by_the_cache() -> None:
    config = config_with({"vllm.num_engines": 1})
    engine = memory_plan(config, asked_of()).engine
    assert module.at_once(config, replace(engine, cache_tokens=10**9), 160) == 512
    assert module.at_once(config, replace(engine, cache_tokens=103_400), 160) == 100  # 160 / 16 + 1024 of each
    without = config_with({"vllm.enable_prefix_caching": False})
    assert module.at_once(without, replace(engine, cache_tokens=118_400), 160) == 100
    few = config_with({"rollout.batch_size": 4, "vllm.num_engines": 2})
    assert module.at_once(few, replace(engine, cache_tokens=10**9), 160) == 32


def test_checkpointing_and_epochs_cost_what_they_compute() -> None:
    plain = seconds(planned({}, asked_of(H100)))["policy"]
    again = seconds(planned({"actor.gradient_checkpointing_enable": True}, asked_of(H100)))["policy"]
    assert again == pytest.approx(plain * 4 / 3)
    assert seconds(planned({"train.max_epochs": 3}, asked_of(H100)))["policy"] == pytest.approx(3 * plain)


def test_parameters_on_their_way_between_nodes() -> None:
    """A model of many parameters and few operations: ZeRO 3 gathers it twice and reduces once, in every pass."""
    two = {"actor.num_nodes": 2, "actor.num_gpus_per_node": 4, "ds.zero_stage": 3, "rollout.batch_size": 16}
    two |= {"train.max_tokens_per_gpu": 20_000}
    plan = planned(two, asked_of(parameters=10 * B))
    # Two passes of 3 * 20 GB, half of it on the other node, over four times 25 GB/s.
    assert seconds(plan)["policy"] == pytest.approx(2 * 60 / 2 / 100)
    assert next(phase for phase in plan.phases if phase.name == "policy").bound == "links"


def test_states_that_sleep_or_stay_in_cpu_memory() -> None:
    sleeping = planned({**COLOCATED, "ds.zero_stage": 3}, asked_of(parameters=4 * B))
    # A rank's fourth: 12 GB of states and 4 of gradients, there and back at 25 GB/s.
    assert seconds(sleeping)["optimizer"] == pytest.approx(2 * (12 + 4) / 25)
    offloaded = planned({"ds.adam_offload": True}, asked_of())
    assert seconds(offloaded)["optimizer"] == pytest.approx(28 / 100 + 6 / 25)
    assert "optimizer" not in seconds(planned({}, asked_of()))


@pytest.mark.parametrize(
    ("changes", "wanted", "bound"),
    [
        ({"sync.backend": "gloo"}, 2 / 0.7, "gloo"),
        ({}, 2 / 60, "links"),
        ({"vllm.num_engines": 16}, 2 / 25, "network"),
        (COLOCATED, 2 / 265, "copies on the GPU"),
    ],
)
def test_the_weights_way(changes: dict[str, Any], wanted: float, bound: str) -> None:
    (sync,) = [phase for phase in planned(changes, asked_of()).phases if phase.name == "sync"]
    assert sync.seconds == pytest.approx(wanted) and sync.bound == bound


def test_a_reference_computes_one_forward_pass() -> None:
    plan = seconds(planned({"algo.kl.init_coef": 0.1}, asked_of(H100)))
    assert plan["reference"] == pytest.approx(plan["policy"] / 3)


def test_nothing_is_said_of_layers_of_another_kind() -> None:
    asked = asked_of(None)
    config = config_with({})
    assert time_plan(config, asked, memory_plan(config, asked).engine, Cluster(card="", rates=RATES["H100"]), 1) is None


def test_rates_by_the_cards_name() -> None:
    assert rates_of("NVIDIA A100-SXM4-80GB") is RATES["A100"] and rates_of("NVIDIA H100 80GB HBM3") is RATES["H100"]
    assert rates_of("NVIDIA H100 PCIe") is RATES["H100 PCIe"] and rates_of("NVIDIA L40S") is RATES["L40S"]
    assert rates_of("NVIDIA L4") is RATES["L4"] and rates_of("NVIDIA TITAN V") is None
