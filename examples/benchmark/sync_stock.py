"""Stock OpenRLHF's broadcast of weights on a machine without a GPU: its own code, with as few overrides as possible.

Its sender (ActorPPOTrainer.broadcast_to_vllm) and its receiver (WorkerWrap.update_weight, reached through
RolloutRayActor.update_weight) run unchanged. `OVERRIDES` lists all that differs. vLLM's workers import this module too.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap

from real_openrlhf.actors.engine.vllm_worker import SyncWorkerExtension
from real_openrlhf.actors.sync.transfer import SyncGroup

DEADLINE_S = 120.0

OVERRIDES = [
    "stateless_init_process_group (PyNccl) makes a gloo group instead, the one of this project's own gloo transport: "
    "there is no NCCL without a GPU; broadcast(tensor, src, stream) stays one call per parameter",
    'torch.empty(..., device="cuda") in WorkerWrap.update_weight allocates on the CPU',
    "torch.cuda.current_stream returns None, torch.cuda.current_device 0, torch.cuda.synchronize does nothing: a CPU "
    "build of torch raises in them",
    "print of WorkerWrap.update_weight (one line per parameter) is silenced, in its favour",
    "ActorPPOTrainer is made without its __init__ (losses, replay buffer), which a broadcast does not use; the policy "
    "actor, its DeepSpeed engine and its weights are those that this project's syncs send",
    "the engine's linear layers stay plain (keep_cpu_weights_loadable), as in this project: vLLM's packed CPU weights "
    "cannot be loaded by load_weights, so that the stock broadcast would fail",
    "the engine is this project's (a subclass of OpenRLHF's RolloutRayActor) with WorkerWrap as its worker extension; "
    "reset_prefix_cache is this project's, which repeats the call until the cache is really empty",
]


class GlooGroup:
    """What stateless_init_process_group returns, with PyNccl's signature of broadcast."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, device: Any) -> None:
        self._group = SyncGroup.create(address, int(port), rank, world_size, "gloo", DEADLINE_S)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self._group.broadcast(tensor, src)


_empty = torch.empty


def _empty_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _empty(*args, **{**kwargs, "device": "cpu"})


def without_cuda(*modules: str) -> ExitStack:
    """Inside, OVERRIDES are active, also for stateless_init_process_group in the named modules."""
    stack = ExitStack()
    for name in modules:
        stack.enter_context(patch(f"{name}.stateless_init_process_group", GlooGroup))
    for name, value in (("current_stream", None), ("current_device", 0), ("synchronize", None)):
        stack.enter_context(patch.object(torch.cuda, name, lambda *args, value=value: value))
    stack.enter_context(patch.object(torch, "empty", _empty_on_cpu))
    return stack


class StockWorker(SyncWorkerExtension, WorkerWrap):
    """Mixed into vLLM's Worker, with both projects' receivers; importing this module keeps linear layers plain."""

    def init_process_group(self, *args: Any, **kwargs: Any) -> None:
        with without_cuda("openrlhf.utils.distributed_util"):
            super().init_process_group(*args, **kwargs)

    def update_weight(self, *args: Any, **kwargs: Any) -> None:
        with without_cuda(), patch("builtins.print"):
            super().update_weight(*args, **kwargs)
