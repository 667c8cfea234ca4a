"""A stock OpenRLHF run on a machine without a GPU, for tiny models: what assumes CUDA in it is replaced, and said.

What is replaced is in `OVERRIDES`. The rest is OpenRLHF's: command, loop, sampling, experiences, advantages, loss and
training step, the configuration of DeepSpeed, bf16.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from contextlib import contextmanager
from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_utils import NaiveReplayBuffer
from openrlhf.trainer.ray.launcher import ReferenceModelActor
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.utils.deepspeed import DeepspeedStrategy

from real_openrlhf.actors.policy.strategy import PolicyStrategy
from real_openrlhf.common.device import Device
from real_openrlhf.dropin.replace import replace
from real_openrlhf.dropin.settings import DropInError
from real_openrlhf.dropin.terms import check_cpu_arguments

logger = logging.getLogger(__name__)

_PolicyActor: Any = PolicyModelActor.__ray_metadata__.modified_class.__ray_actor_class__
_ReferenceActor: Any = ReferenceModelActor.__ray_metadata__.modified_class.__ray_actor_class__
_Engine: Any = RolloutRayActor.__ray_metadata__.modified_class.__ray_actor_class__

WORKER = "real_openrlhf.dropin.on_cpu_worker.CpuWorkerWrap"
DEVICE = Device(name="cpu", dtype_name="bf16")
# Ray hands them out by number only, one to each actor and engine.
_LOGICAL_GPUS = 6

OVERRIDES: dict[str, str] = {
    "ray.init": f"{_LOGICAL_GPUS} GPUs and CPUs are declared to Ray, which only counts them",
    "torch.cuda.current_device": "is the CPU; synchronize, set_device and current_stream do nothing",
    "DeepspeedStrategy": "gloo and a CPU mesh; torch's AdamW; sums stay in CPU memory",
    "NaiveReplayBuffer": "its target device is the CPU",
    "stateless_init_process_group": "weights go to the engines over a TCP store instead of NCCL",
    "WorkerWrap.update_weight": "receives them from there, and vLLM's linear layers compute from their parameters",
    "RolloutRayActor": "vLLM's settings for a CPU: no chunked prefill, 1 GiB of KV cache",
    "flash_attn": "--ds.attn_implementation is sdpa, and log-probs are computed without Triton",
}


def install_on_cpu(policy: Any, engine: Any) -> tuple[Any, Any]:
    """Ours in the place of OpenRLHF's in the driver. policy, engine: classes to put on a CPU; None: the stock ones.

    Returns the classes to start instead. Ray is started here: OpenRLHF then joins it.
    """
    for what, how in OVERRIDES.items():
        logger.info("on a CPU: %s: %s", what, how)
    replace("openrlhf.trainer.ray.launcher:ReferenceModelActor", ray.remote(num_gpus=1)(CpuReferenceActor))
    replace("openrlhf.utils:get_strategy", _strategy)
    before = importlib.import_module("openrlhf.utils.config").hierarchize

    def arguments(flat: Any) -> Any:
        args = before(flat)
        check_cpu_arguments(args)
        args.ds.attn_implementation = "sdpa"
        _start_ray()
        return args

    replace("openrlhf.utils.config:hierarchize", arguments)
    bases = (CpuPolicyActor,) if policy is None else (CpuPolicyActor, policy)
    engines = (CpuEngine,) if engine is None else (CpuEngine, engine)
    return type("CpuPolicyActor", bases, {"__init__": CpuPolicyActor.__init__}), type("CpuEngine", engines, {})


def _start_ray() -> None:
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS"):
        raise DropInError(
            "--real.device cpu starts a Ray of its own; stop the one that is joined, or unset RAY_ADDRESS"
        )
    variables = {"TOKENIZERS_PARALLELISM": "true", "RAY_worker_niceness": "0", **DEVICE.trainer_env(1)}
    # Ray's processes inherit what is set here; the cores' share is set per process.
    os.environ.update({name: os.environ.get(name, value) for name, value in variables.items()})
    ray.init(num_cpus=_LOGICAL_GPUS, num_gpus=_LOGICAL_GPUS, include_dashboard=False)


class CpuStrategy(PolicyStrategy):
    """OpenRLHF's strategy on a CPU; unlike in the base class, losses are averaged over the accumulation steps."""

    def backward(self, loss: torch.Tensor, model: Any, _optimizer: Any = None, **kwargs: Any) -> None:
        DeepspeedStrategy.backward(self, loss, model, _optimizer)

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        with _cpu_is_the_device():
            return super().all_reduce(data, op)


def _strategy(args: Any) -> CpuStrategy:
    return CpuStrategy(args, DEVICE)


class CpuReplayBuffer(NaiveReplayBuffer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        device, torch.cuda.current_device = torch.cuda.current_device, lambda: 0  # it makes "cuda:0" of it
        try:
            super().__init__(*args, **kwargs)
        finally:
            torch.cuda.current_device = device
        self.target_device = torch.device("cpu")


class StoreGroup:
    """What OpenRLHF uses of a PyNcclCommunicator: broadcast, over vLLM's own TCP store."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        received = self.group.broadcast(tensor.detach(), src)
        if received is not tensor:
            tensor.detach().copy_(received)


def store_group(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> StoreGroup:
    from vllm.distributed.utils import StatelessProcessGroup

    return StoreGroup(
        StatelessProcessGroup.create(host=master_address, port=master_port, rank=rank, world_size=world_size)
    )


def become_cpu() -> None:
    """In an actor's process: what OpenRLHF asks of CUDA there."""
    cuda: Any = torch.cuda
    cuda.current_device = _cpu
    cuda.synchronize = cuda.set_device = cuda.current_stream = _nothing
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]  # OpenRLHF's way without it
    torch.set_num_threads(DEVICE.trainer_threads(1))
    replace("openrlhf.trainer.ray.ppo_actor:NaiveReplayBuffer", CpuReplayBuffer)
    replace("openrlhf.trainer.ray.ppo_actor:stateless_init_process_group", store_group)


def _cpu() -> torch.device:
    return torch.device("cpu")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def _cpu_is_the_device() -> Any:
    before, torch.cuda.current_device = torch.cuda.current_device, _cpu  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.current_device = before


class CpuPolicyActor(_PolicyActor):  # type: ignore[misc]
    def __init__(self, world_size: int, rank: int, master_addr: str | None, master_port: int | None) -> None:
        become_cpu()
        super().__init__(world_size, rank, master_addr, master_port)


class CpuReferenceActor(_ReferenceActor):  # type: ignore[misc]
    def __init__(self, world_size: int, rank: int, master_addr: str | None, master_port: int | None) -> None:
        become_cpu()
        super().__init__(world_size, rank, master_addr, master_port)


class CpuEngine(_Engine):  # type: ignore[misc]
    async def __init__(self, *args: Any, max_model_len: int, **kwargs: Any) -> None:  # type: ignore[misc]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.update(DEVICE.engine_env())
        options = DEVICE.engine_options(max_model_len, fp32_head=False)
        kwargs |= {"worker_extension_cls": WORKER, "max_model_len": max_model_len, **options}
        await super().__init__(*args, **kwargs)
