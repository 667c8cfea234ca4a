"""DeepSpeed's configuration by device: which optimizer, and in which precision gradients add up."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from real_openrlhf.actors.policy.strategy import PolicyStrategy
from real_openrlhf.common.device import Device
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.openrlhf_args import to_openrlhf_args

ADAM = {"type": "AdamW", "params": {"lr": 1e-6}}


def ds_config(device: Device, **flags: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    config = build_config({"actor.model_name_or_path": "m", "data.prompt_dataset": "d", **named})
    args = to_openrlhf_args(config, device_dtype=device.dtype_name, attn="sdpa", sync_backend=device.dist_backend)
    strategy = PolicyStrategy(args, device)
    strategy.accumulated_gradient, strategy.world_size = 1, 1
    return strategy.get_ds_train_config(copy.deepcopy(ADAM))


CPU, CUDA = Device(name="cpu", dtype_name="fp32"), Device(name="cuda", dtype_name="bf16")


@pytest.mark.parametrize(
    ("device", "flags", "torchs"),
    [
        (CPU, {}, True),
        (CUDA, {}, True),
        (CUDA, {"ds__zero_stage": 3}, True),
        (CUDA, {"ds__zero_stage": 2, "ds__enable_sleep": True}, True),
        # DeepSpeed asserts that it is its own.
        (CUDA, {"ds__zero_stage": 3, "ds__enable_sleep": True}, False),
        (CUDA, {"ds__adam_offload": True}, False),
    ],
)
def test_no_kernel_is_compiled_where_torch_has_one(device: Device, flags: dict[str, Any], torchs: bool) -> None:
    params = ds_config(device, **flags)["optimizer"]["params"]
    assert (params.get("torch_adam"), params.get("fused")) == ((True, True) if torchs else (None, None))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({}, "fp32"),
        ({"ds__zero_stage": 3}, "fp32"),
        ({"ds__grad_accum_dtype": "bf16"}, "bf16"),
        ({"ds__zero_stage": 1}, None),
        ({"ds__zero_stage": 0}, None),
    ],
)
def test_gradients_add_up_in_fp32(flags: dict[str, Any], dtype: str | None) -> None:
    assert ds_config(CUDA, **flags)["data_types"]["grad_accum_dtype"] == dtype
