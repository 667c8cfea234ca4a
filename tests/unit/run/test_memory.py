"""The least memory of a plan, by hand: 1e9 parameters make bytes per parameter into GB."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from real_openrlhf.common.cards import Card
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.run.memory import check_memory, count_parameters, memory_problem, policy_bytes
from tests.unit.config.test_validate import COLOCATED, config_with
from tests.unit.run.test_specs import config_of

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
        {**SIXTEEN, "train.colocate_all": True, **WIDE},  # 32.8 next to 0.5 * 80
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
            ["65.5 GB", "next to the engines' 40.0 GB", "--vllm.enable_sleep with --ds.enable_sleep"],
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


# -- memory of the GPUs here -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A folder with a model's config alone, and its number of parameters: the tied head counts once."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("config")
    sizes = dict(vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    LlamaConfig(**sizes, num_key_value_heads=1, head_dim=4, tie_word_embeddings=True).save_pretrained(folder)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    return str(folder), 50 * 8 + 2 * layer + 8


def test_parameters_are_counted_without_weights(small: tuple[str, int], tmp_path: Any) -> None:
    folder, n = small
    assert count_parameters(folder) == n
    assert count_parameters(str(tmp_path)) is None


def test_a_model_that_cannot_fit_is_refused(small: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, n = small
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    enough = Card(name="A", capability=(9, 0), memory=16 * n, driver="580")
    little = replace(enough, memory=16 * n - 1)
    config = config_of("--actor.model_name_or_path", folder, "--vllm.gpu_memory_utilization", "1")
    assert check_memory(config, [enough]) == check_memory(config, [little, enough]) == check_memory(config, []) == []
    with pytest.raises(ConfigError, match=r"on each of 1 GPU\(s\) .* the largest GPU here"):
        check_memory(config, [little])
    # fp32: as many bytes, but four of them weights. The CPU has no cards, and an unknown model no size.
    with pytest.raises(ConfigError, match="on each of 1"):
        check_memory(config_of("--actor.model_name_or_path", folder, "--ds.param_dtype", "fp32"), [little])
    assert check_memory(config_of("--actor.model_name_or_path", folder, "--real.device", "cpu"), [little]) == []
    assert check_memory(config_of("--actor.model_name_or_path", "/no/such/folder"), [little]) == []
    # The cluster that is joined may have other GPUs.
    (warning,) = check_memory(replace(config, ray=replace(config.ray, address="10.0.0.1:1")), [little])
    assert warning.startswith("if the cluster's GPUs are like this machine's: the policy of 0.0 billion")
