"""The least memory of a plan, by hand: 1e9 parameters make bytes per parameter into GB."""

from __future__ import annotations

from typing import Any

import pytest

from real_openrlhf.config.memory import memory_problem, policy_bytes
from tests.unit.config.test_validate import COLOCATED, config_with

B = 10**9
# Qwen3-32B, and a card of 80 GB.
P32, CARD = 32_760_000_000, 80 * B


@pytest.mark.parametrize(
    ("changes", "weight_bytes", "gb"),
    [
        ({"ds.zero_stage": 0}, 2, 2 + 2 + 12),
        ({"ds.zero_stage": 0, "actor.num_gpus_per_node": 4}, 2, 16),
        ({"ds.zero_stage": 1, "actor.num_gpus_per_node": 4}, 2, 2 + 2 + 3),
        ({"ds.zero_stage": 2, "actor.num_gpus_per_node": 4}, 2, 2 + 0.5 + 3),
        ({"ds.zero_stage": 3, "actor.num_gpus_per_node": 4, "actor.num_nodes": 2}, 2, 2),
        ({"ds.zero_stage": 0}, 4, 4 + 4 + 8),
        ({"ds.zero_stage": 3, "actor.num_gpus_per_node": 4}, 4, 4),
        ({"ds.zero_stage": 2, "ds.adam_offload": True, "actor.num_gpus_per_node": 4}, 2, 2),
        ({"ds.zero_stage": 3, "ds.adam_offload": True, "actor.num_gpus_per_node": 4}, 2, 0.5),
        ({"ds.lora.rank": 8}, 2, 2),
    ],
)
def test_what_a_rank_holds(changes: dict[str, Any], weight_bytes: int, gb: float) -> None:
    assert policy_bytes(config_with(changes), B, weight_bytes) == gb * B


SIXTEEN = {"actor.num_nodes": 2, "actor.num_gpus_per_node": 8, "ds.zero_stage": 3}
TURNS = {"train.colocate_all": True, "vllm.enable_sleep": True, "ds.enable_sleep": True}
WIDE = {"vllm.num_engines": 8, "vllm.tensor_parallel_size": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {**SIXTEEN, **TURNS, **WIDE},
        {"actor.num_gpus_per_node": 8, "ds.zero_stage": 3, **WIDE},  # 16 * 32.76 / 8 = 65.5
        {"actor.num_gpus_per_node": 4, "ds.zero_stage": 3, "ds.adam_offload": True, **WIDE},
        {"ds.lora.rank": 8, **WIDE},  # 65.5 of weights
        {**SIXTEEN, "train.colocate_all": True, **WIDE},  # 32.8 beside 0.5 * 80
    ],
)
def test_plans_that_may_fit(changes: dict[str, Any]) -> None:
    assert memory_problem(config_with(changes), P32, 2, CARD) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"actor.num_gpus_per_node": 6, "ds.zero_stage": 3, **WIDE},
            ["32.8 billion", "87.4 GB on each of 6 GPU(s)", "has 80.0 GB", "use more ranks", "--ds.adam_offload"],
        ),
        ({"actor.num_gpus_per_node": 8, **WIDE}, ["122.8 GB", "use --ds.zero_stage 3, or more ranks"]),
        ({"ds.zero_stage": 3, "ds.lora.rank": 8, "ds.param_dtype": "fp32", **WIDE}, ["65.5 GB of weights", "raise"]),
        (
            {"actor.num_gpus_per_node": 8, "ds.zero_stage": 3, "train.colocate_all": True, **WIDE},
            ["65.5 GB", "beside the engines' 40.0 GB", "--vllm.enable_sleep with --ds.enable_sleep"],
        ),
        ({**SIXTEEN, "vllm.gpu_memory_utilization": 0.8}, ["65.5 GB of weights", "64.0 GB", "tensor_parallel_size"]),
    ],
)
def test_plans_that_cannot(changes: dict[str, Any], says: list[str]) -> None:
    weight_bytes = 4 if changes.get("ds.param_dtype") == "fp32" else 2
    problem = memory_problem(config_with(changes), P32, weight_bytes, CARD if weight_bytes == 2 else 60 * B)
    assert problem is not None and all(text in problem for text in says), problem


def test_the_least_is_the_least() -> None:
    config = config_with({**COLOCATED, "ds.zero_stage": 3})  # four ranks: 4 GB per 1e9 parameters
    assert memory_problem(config, B, 2, 4 * B) is None
    assert "needs at least 4.0 GB" in str(memory_problem(config, B, 2, 4 * B - 1))
