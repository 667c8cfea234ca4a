"""Sends buckets of weights by NCCL, two at a time: one travels while the other is filled or loaded. Torch only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from real_openrlhf.actors.sync.cuda_ipc import wait_for
from real_openrlhf.actors.sync.shared_memory import Wait, nothing_left

T = TypeVar("T")


class DoubleBuffered:
    """The transport of a group with `ahead`: bucket n travels while bucket n + 1 is filled, or bucket n - 1 loaded.

    Bucket n is in slot n % 2; the two slots exist during a sync only. Before a bucket's `buffer` is called, the
    broadcast of the earlier bucket in its slot must be complete; `SyncGroup.buffer` waits for it.
    """

    ahead = 1

    def __init__(
        self,
        begin: Callable[[Tensor, int], Callable[[], bool]],
        device: torch.device,
        timeout_s: float,
        close: Callable[[], None] = nothing_left,
    ) -> None:
        """begin: starts a broadcast after all work that this process has given to the device so far, and returns a
        function that says whether it is done.
        """
        self._begin, self._close = begin, close
        self._device, self._timeout_s = device, timeout_s
        self._n = 0
        self._slots: dict[int, Tensor] = {}

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        size, slot = numel * dtype.itemsize, self._n % 2
        if slot not in self._slots or self._slots[slot].numel() < size:
            self._slots.pop(slot, None)  # before the new one is made, to free its memory
            self._slots[slot] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._slots[slot][:size].view(dtype)

    def broadcast(self, tensor: Tensor, src: int) -> Wait:
        done = self._begin(tensor, src)
        self._n += 1
        return lambda: wait_for(done, self._timeout_s, "NCCL broadcast")

    def flush(self) -> None:
        self._slots = {}

    def destroy(self) -> None:
        self._slots = {}
        self._close()


def nccl(address: str, port: int, rank: int, world_size: int, timeout_s: float, device: torch.device) -> DoubleBuffered:
    """Meet the other ranks, as in `SyncGroup.create`."""
    # vLLM's wrapper, which the engines import anyway. Torch's NCCL groups need torch.distributed's default group, which
    # policy and engines both use for themselves.
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(
        host=address, port=port, rank=rank, world_size=world_size, store_timeout=max(1, int(timeout_s))
    )
    comm = _within(timeout_s, "ncclCommInitRank", lambda: PyNcclCommunicator(group, device=device))
    if not comm.available:
        raise RuntimeError("the NCCL library could not be loaded")
    side = torch.cuda.Stream(device)

    def begin(tensor: Tensor, src: int) -> Callable[[], bool]:
        # Wait for the sender's copies into the buffer, and for a receiver's loading of the bucket before.
        side.wait_stream(torch.cuda.current_stream(device))
        comm.broadcast(tensor, src=src, stream=side)
        done = torch.cuda.Event()
        done.record(side)
        return done.query

    return DoubleBuffered(begin, device, timeout_s, close=comm.destroy)


def _within(timeout_s: float, what: str, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError; then the thread keeps running, since nothing can interrupt it."""
    result: list[T] = []
    errors: list[BaseException] = []
    device = torch.cuda.current_device()

    def run() -> None:
        try:
            torch.cuda.set_device(device)  # the current device is per thread
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name=what)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not result:
        raise TimeoutError(f"{what} not done after {timeout_s:g} s")
    return result[0]
