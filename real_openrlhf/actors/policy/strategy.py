"""OpenRLHF's DeepSpeed strategy on any device.

Four things differ from OpenRLHF's: the device decides the backend and the mesh, the optimizer has another kernel,
gradients are summed in fp32, and their norm is known under ZeRO 0 too.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from openrlhf.utils.deepspeed import DeepspeedStrategy
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from real_openrlhf.actors.policy.finite import without_step
from real_openrlhf.algo.packing import Row, micro_batches, spread
from real_openrlhf.common.device import Device


class PolicyStrategy(DeepspeedStrategy):
    """Overrides the methods of openrlhf/utils/deepspeed/deepspeed.py that assume CUDA; see openrlhf_internals.py."""

    def __init__(self, args: Namespace | SimpleNamespace, device: Device) -> None:
        super().__init__(
            seed=args.train.seed,
            full_determinism=args.train.full_determinism_enable,
            max_norm=args.actor.max_norm,
            micro_train_batch_size=args.train.micro_batch_size,
            train_batch_size=args.train.batch_size,
            zero_stage=args.ds.zero_stage,
            args=args,
        )
        self.device = device
        self._plain_norm: float | None = None

    def setup_distributed(self, timeout: timedelta = timedelta(minutes=60)) -> None:
        """Join the policy's process group and build the data-parallel mesh."""
        if self.full_determinism:
            transformers.enable_full_determinism(self.seed)
            # That call also makes torch fill every new buffer, as a debugging aid. For DeepSpeed's buckets of 2 GB
            # this costs seconds per step, and nothing reads them before they are written.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        else:
            transformers.set_seed(self.seed)
        self.device.set_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
        if not self.device.is_cuda:
            # DeepSpeed's shared-memory reduction is for inference only. It is compiled at the first start, and a
            # process that is killed meanwhile leaves a lock for which every later start waits forever.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=self.device.dist_backend, timeout=timeout)
        self.world_size = dist.get_world_size()
        self.ds_device_mesh = init_device_mesh(
            self.device.name, (self.world_size, 1, 1), mesh_dim_names=("dp", "sp", "tp")
        )
        self.setup_ring_attn(self.ds_device_mesh)
        self.accumulated_gradient = max(1, self.train_batch_size // self.micro_train_batch_size // self.world_size)

    def get_ds_train_config(
        self, optim_dict: dict[str, Any] | None = None, *, max_norm: float | None = None
    ) -> dict[str, Any]:
        """OpenRLHF's configuration, with torch's fused AdamW, whose kernel needs no compilation, and gradients in fp32.

        DeepSpeed's own FusedAdam is compiled by nvcc at the first start. It is used only where DeepSpeed needs it:
        ZeRO 3 moves no other optimizer's states off the GPU (zero/stage3.py, offload_states). With --ds.adam_offload
        DeepSpeed's CPU Adam is used.

        The trainer marks accumulation boundaries itself (dynamic sampling varies the batch), so
        the accumulation steps given here are nominal and no loss is scaled by them.
        """
        ds_config = super().get_ds_train_config(optim_dict, max_norm=max_norm)
        ds_config.pop("train_batch_size", None)
        ds_config["gradient_accumulation_steps"] = self.accumulated_gradient
        deepspeeds_own = self.adam_offload or (self.device.is_cuda and self.stage == 3 and self.args.ds.enable_sleep)
        if "optimizer" in ds_config and not deepspeeds_own:
            ds_config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
        if ds_config["data_types"]["grad_accum_dtype"] is None and self.stage >= 2:
            # In a bf16 sum, a gradient that is 256 times smaller than the sum so far would be lost. Stages 0 and 1
            # do not support a second dtype, or switch to another optimizer for it.
            ds_config["data_types"]["grad_accum_dtype"] = "fp32"
        return ds_config

    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any]:
        """OpenRLHF's configuration of a model without an optimizer, for any number of ranks."""
        ds_config = super().get_ds_eval_config(offload=offload)
        ds_config.pop("train_batch_size", None)
        ds_config["gradient_accumulation_steps"] = 1
        return ds_config

    def backward(self, loss: torch.Tensor, model: Any, _optimizer: Any = None, **kwargs: Any) -> None:
        """Backward of one micro-batch. The losses of an update are parts of one sum, so they are not divided.

        Call `mark_boundary` before the forward.
        """
        model.model.backward(loss, scale_wrt_gas=False)

    def mark_boundary(self, model: Any, *, last: bool) -> None:
        """Tell DeepSpeed, before a forward, whether it is the last one of the update."""
        model.model.set_gradient_accumulation_boundary(last)

    def optimizer_step(self, _optimizer: Any, model: Any, _scheduler: Any, name: str = "model", **kwargs: Any) -> None:
        engine = model.model
        self._plain_norm = None
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            # Torch's own, under ZeRO 0 in fp32: DeepSpeed clips by this norm and does not keep it.
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._plain_norm = float(torch.nn.utils.get_total_norm(gradients))
        super().optimizer_step(_optimizer, model, _scheduler, name=name, **kwargs)

    def get_grad_norm(self, model: Any) -> float:
        """Of the last update, before clipping; OpenRLHF has 0 under ZeRO 0 in fp32."""
        return float(super().get_grad_norm(model)) if self._plain_norm is None else self._plain_norm

    def skip_step(self, model: Any) -> None:
        """In place of `optimizer_step`: the update ends, and nothing has changed."""
        with without_step(model.model):
            model.model.step()

    def sum_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """The dict's values summed over all ranks, in float64. It must have the same keys on every rank."""
        names = sorted(values)
        packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device.current())
        dist.all_reduce(packed)
        return dict(zip(names, packed.tolist()))

    def add_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's sum over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def max_over_ranks(self, value: float) -> float:
        packed = torch.tensor([value], dtype=torch.float64, device=self.device.current())
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        return float(packed.item())


def add_up_in_fp32(optimizer: Any) -> None:
    """Make DeepSpeed's ZeRO 2 add up the gradients of an update's micro-batches in its own grad_accum_dtype.

    DeepSpeed 0.19 keeps the first micro-batch's gradients as they are, in bf16, and adds the others to them
    (zero/stage_1_and_2.py, independent_gradient_partition_epilogue), so the setting has no effect. Under ZeRO 3, with
    --ds.adam_offload and in fp32 there is nothing to repair, and nothing is changed.
    """
    wanted = getattr(optimizer, "gradient_accumulation_dtype", None)
    narrow = wanted is not None and getattr(optimizer, "dtype", wanted) != wanted
    if not narrow or not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    plain = optimizer.get_all_grad_tensors

    def wide(parameters: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        gradients = plain(parameters, dtype)
        group = next(i for i, mine in enumerate(optimizer.params_in_partition) if mine is parameters)
        first = optimizer.all_grad_tensors.get(group) is None
        # Later gradients are added to the first ones, whose dtype decides the sum's.
        return [g.to(dtype) for g in gradients] if first else gradients

    optimizer.get_all_grad_tensors = wide


def equal_micro_batches(rows: Sequence[Row], strategy: PolicyStrategy) -> list[list[Row]]:
    """Micro-batches within the bounds of the flags, equally many on every rank.

    A rank with longer rollouts may need more forward passes. With sharded parameters each pass is a collective
    operation, so all ranks must run equally many.
    """
    train = strategy.args.train
    parts = micro_batches(rows, max_rollouts=train.micro_batch_size, max_tokens=train.max_tokens_per_gpu)
    return spread(parts, round(strategy.max_over_ranks(float(len(parts)))))
