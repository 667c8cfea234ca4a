"""`cuda_ipc.Memory` on a CPU: an anonymous file stands in for a GPU's memory, its path for the CUDA IPC handle."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


class MemfdMemory:
    """gpu: the UUID of the GPU that it pretends to be."""

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu
        self._files: dict[int, int] = {}

    def gpu(self) -> str:
        return self._gpu

    def allocate(self, size: int) -> Tensor:
        fd = os.memfd_create("real_openrlhf_gpu")
        os.ftruncate(fd, size)
        memory = _mapped(fd, size)
        self._files[memory.data_ptr()] = fd
        return memory

    def export(self, tensor: Tensor) -> str:
        return f"/proc/{os.getpid()}/fd/{self._files[tensor.data_ptr()]}"

    def open(self, handle: str, size: int) -> Tensor:
        fd = os.open(handle, os.O_RDWR)
        try:
            return _mapped(fd, size)
        finally:
            os.close(fd)

    def finish(self, timeout_s: float) -> None:
        """A CPU is done when it returns."""

    def __del__(self) -> None:
        for fd in self._files.values():
            os.close(fd)


def _mapped(fd: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
