"""Added to every vLLM worker, so that it can receive the policy's weights.

vLLM imports this module in the worker before the model is loaded. It must not import openrlhf,
deepspeed or ray, which would cost every worker seconds and memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from real_openrlhf.actors.engine.owner_watch import end_with_owner
from real_openrlhf.actors.engine.segments import unlink_mapped_segments
from real_openrlhf.actors.sync.cuda_ipc import place
from real_openrlhf.actors.sync.transfer import NO_VERSION, Bucket, SyncError, SyncGroup, from_wire, receive_buckets

logger = logging.getLogger(__name__)


def keep_cpu_weights_loadable() -> None:
    """On CPU, make vLLM compute linear layers from their parameters.

    vLLM packs each linear weight into a oneDNN handle and empties the parameter; a tied head gets
    another packed copy. Weights that are loaded later then do not reach the linear layers, or leave the
    head stale while all parameters compare equal. With plain F.linear, the parameter itself is used.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    if getattr(pack, "is_plain", False):
        return

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if not layer.weight.is_meta and layer.weight.ndim != 2:
            # Not a linear layer: convolution kernels need their own packing.
            return pack(layer, remove_weight)
        layer.cpu_linear = torch.nn.functional.linear

    dispatch.is_plain = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch


class SyncWorkerExtension:
    """Mixed into vLLM's Worker; the methods are called through `collective_rpc`."""

    # The worker provides these. No values here: vLLM refuses attributes that the worker also has.
    model_runner: Any
    rank: int
    device: torch.device

    def init_sync_group(
        self,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        backend: str,
        timeout_s: float,
        buffer_bytes: int = 0,
    ) -> int:
        """Join the group as rank rank_offset + the worker's own rank; that rank is returned."""
        old: SyncGroup | None = getattr(self, "_sync_group", None)
        self._sync_group: SyncGroup | None = None
        if old is not None:
            old.destroy()
        rank = rank_offset + self.rank
        self._sync_group = SyncGroup.create(
            address, port, rank, world_size, backend, timeout_s, device=self.device, buffer_bytes=buffer_bytes
        )
        return rank

    def sync_host(self) -> str:
        """`cuda_ipc.place` of this worker."""
        return place(self.device)

    def receive_weights(self, plan: Sequence[Sequence[Sequence[Any]]], version: int) -> int:
        """Receive all buckets of the plan (`sync.transfer.to_wire`) and load them into the model.

        Returns the new version. Raises SyncError naming the last parameter when a broadcast or a
        load fails, or when the plan leaves parameters of the model without a value.
        """
        group = getattr(self, "_sync_group", None)
        if group is None:
            raise SyncError("receive_weights before init_sync_group")
        self._sync_version = NO_VERSION
        loaded: set[str] | None = set()
        failure: Exception | None = None
        for bucket, weights in receive_buckets(group, from_wire(plan)):
            if failure is not None:
                continue  # keep receiving: a sender whose receiver stopped would wait for its deadline
            try:
                loaded = self._load(bucket, weights, loaded)
            except SyncError as error:
                failure = error
        group.flush()
        if failure is not None:
            raise failure
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        missing = sorted(set(dict(self._sync_model().named_parameters())) - loaded) if loaded is not None else []
        if missing:
            raise SyncError(f"the sync gave no value to {len(missing)} parameters of the engine: {missing[:5]}")
        self._sync_version = version
        return version

    def forget_shared_memory(self) -> list[str]:
        """Take away the names of vLLM's shared memory, which stays with the processes that have mapped it.

        Else a segment of 160 MiB outlives every engine that does not end by itself. Returns the names.
        """
        return unlink_mapped_segments()

    def sync_version(self) -> int:
        """Version of the last complete sync, NO_VERSION (-1) without one."""
        return getattr(self, "_sync_version", NO_VERSION)

    def _sync_model(self) -> Any:
        return self.model_runner.model

    def _load(
        self, bucket: Bucket, weights: list[tuple[str, torch.Tensor]], loaded: set[str] | None
    ) -> set[str] | None:
        """Load one bucket. Returns all names of engine parameters loaded so far; None if the model does not tell."""
        last = "nothing"

        def watched() -> Any:
            nonlocal last
            for name, tensor in weights:
                last = name
                yield name, tensor

        try:
            names = self._sync_model().load_weights(watched())
        except Exception as error:
            raise SyncError(
                f"loading {last} (shape {[list(p.shape) for p in bucket.parameters if p.name == last]}) failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        return None if names is None or loaded is None else loaded | set(names)


keep_cpu_weights_loadable()
end_with_owner()
