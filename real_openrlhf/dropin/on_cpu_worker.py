"""OpenRLHF's extension of vLLM's workers, on a CPU. vLLM imports it in each worker, before the model is loaded."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap

# Importing it makes vLLM's linear layers compute from their parameters, so that weights that arrive are used.
from real_openrlhf.actors.engine import vllm_worker  # noqa: F401
from real_openrlhf.dropin.replace import replace


def _store_group(*args: Any) -> Any:
    from vllm.distributed.utils import StatelessProcessGroup

    address, port, rank, world_size, _ = args
    return StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=world_size)


replace("openrlhf.utils.distributed_util:stateless_init_process_group", _store_group)


class CpuWorkerWrap(WorkerWrap):
    def update_weight(self, name: str, dtype: torch.dtype, shape: Any, empty_cache: bool = False) -> None:
        """As OpenRLHF's, from the store instead of NCCL."""
        worker: Any = self
        assert dtype == worker.model_config.dtype, f"mismatch dtype: src {dtype}, dst {worker.model_config.dtype}"
        weight = worker._model_update_group.broadcast(torch.empty(shape, dtype=dtype), src=0)
        worker.model_runner.model.load_weights(weights=[(name, weight)])
