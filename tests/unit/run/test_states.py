"""Bytes of a rank by hand, 1e9 parameters making bytes per parameter into GB, and by DeepSpeed's own estimators."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from real_openrlhf.run.model_shape import ModelShape
from real_openrlhf.run.states import policy_states
from tests.unit.config.test_validate import config_with

B = 10**9


def shape_of(parameters: int, **more: Any) -> ModelShape:
    sizes: dict[str, Any] = dict(
        frozen=(), decayed=(parameters,), other=(), decoder=None, head_norms=False, norms=2, largest_layer=0
    )
    return ModelShape(parameters=parameters, **{**sizes, "largest_tensor": parameters, **more})


FOUR, EIGHT = {"actor.num_gpus_per_node": 4}, {"actor.num_gpus_per_node": 4, "actor.num_nodes": 2}


@pytest.mark.parametrize(
    ("changes", "itemsize", "gb"),
    [
        # weights, gradients, master, moments, copy of the gradients in the optimizer's step
        ({"ds.zero_stage": 0}, 2, (2, 2, 4, 8, 4)),
        ({"ds.zero_stage": 0, **FOUR}, 2, (2, 2, 4, 8, 4)),
        ({"ds.zero_stage": 1, **FOUR}, 2, (2, 2, 1, 2, 1)),
        ({"ds.zero_stage": 2, **FOUR}, 2, (2, 1, 1, 2, 1)),
        ({"ds.zero_stage": 2, "ds.grad_accum_dtype": "bf16", **FOUR}, 2, (2, 0.5, 1, 2, 1)),
        ({"ds.zero_stage": 3, **EIGHT}, 2, (0.25, 0.5, 0.5, 1, 0.5)),
        ({"ds.zero_stage": 3, "ds.zpg": 4, **EIGHT}, 2, (0.25 + 0.5, 0.5, 0.5, 1, 0.5)),
        ({"ds.zero_stage": 0}, 4, (4, 4, 0, 8, 0)),
        ({"ds.zero_stage": 2, **FOUR}, 4, (4, 1, 1, 2, 1)),
        ({"ds.zero_stage": 3, **FOUR}, 4, (1, 1, 1, 2, 1)),
    ],
)
def test_what_a_rank_holds(changes: dict[str, Any], itemsize: int, gb: tuple[float, ...]) -> None:
    found = policy_states(config_with(changes), shape_of(B), itemsize)
    parts = (found.weights, found.gradients, found.master, found.moments, found.copy)
    assert parts == tuple(x * B for x in gb) and found.optimizer == found.master + found.moments


def test_adapters_alone_have_gradients_and_states() -> None:
    config = config_with({"ds.zero_stage": 2, "ds.lora.rank": 8, **FOUR})
    found = policy_states(config, shape_of(B, frozen=(B,), decayed=(8000,)), 2)
    assert found.weights == 2 * B + 2 * 8000 and found.gradients == found.master == 4 * 2000
    sharded = policy_states(config_with({"ds.zero_stage": 3, "ds.lora.rank": 8, **FOUR}), shape_of(B, frozen=(B,)), 2)
    assert sharded.weights == 2 * (B + B) // 4


def test_the_optimizers_step_copies_a_sub_group_at_a_time() -> None:
    assert policy_states(config_with({"ds.zero_stage": 3}), shape_of(3 * B), 2).copy == 4 * B
    assert policy_states(config_with({"ds.zero_stage": 2}), shape_of(3 * B), 2).copy == 12 * B


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 8), (1, 3)])
def test_deepspeeds_estimators_say_the_same(nodes: int, gpus: int) -> None:
    total, ranks = 32_762_123_264, nodes * gpus
    changes = {"actor.num_nodes": nodes, "actor.num_gpus_per_node": gpus}
    three = policy_states(config_with({**changes, "ds.zero_stage": 3}), shape_of(total), 2)
    _, wanted, of_a_layer = estimate_zero3_model_states_mem_needs(total, 1000, gpus, nodes, cpu_offload=False)
    held = three.weights + three.gradients + three.optimizer
    assert held == pytest.approx(wanted - of_a_layer, abs=20)  # padding
    two = policy_states(config_with({**changes, "ds.zero_stage": 2}), shape_of(total), 2)
    _, wanted = estimate_zero2_model_states_mem_needs(total, gpus, nodes, cpu_offload=False)
    # With the rank's own gradients in the weights' dtype, as they come out of a backward pass.
    held = two.weights + two.gradients + two.optimizer + two.reduced
    assert held == pytest.approx(wanted, abs=20 * 2 * ranks)


def test_buffers_of_the_backward_pass() -> None:
    def buckets(**changes: Any) -> tuple[int, int]:
        named = {name.replace("__", "."): value for name, value in changes.items()}
        found = policy_states(config_with(named), shape_of(4 * B), 2)
        return found.buckets, found.reduced

    assert buckets(ds__zero_stage=0) == (0, 0)
    assert buckets(ds__zero_stage=1) == (B, 0)
    assert buckets(ds__zero_stage=2) == (B, 8 * B) and buckets(ds__zero_stage=2, ds__overlap_comm=True) == (
        2 * B,
        8 * B,
    )
    assert buckets(ds__zero_stage=3) == (B, B)


def test_whole_parameters_are_bounded() -> None:
    config = config_with({"ds.zero_stage": 3, **FOUR})
    assert policy_states(config, shape_of(4 * B, largest_tensor=B), 2).gathered == 2 * (B + B)
    assert policy_states(config, shape_of(B, largest_tensor=B), 2).gathered == 2 * B
    assert policy_states(config_with({"ds.zero_stage": 3}), shape_of(B), 2).gathered == 0
