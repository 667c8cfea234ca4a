"""Sends buckets of weights through GPU memory that a policy rank and the engine worker on its GPU have both mapped.

Every policy rank has the complete (gathered) parameters of a bucket, so no weight leaves its GPU. The rank copies them
into a flat buffer. The engine worker on the same GPU opened this buffer by its CUDA IPC handle when the group was
formed, and loads them from there. Partners find each other by the GPU's UUID, since the two processes may number their
GPUs differently. A buffer has two slots: one is filled while the other is loaded. Torch only.

The buffers stay until the group is destroyed: two slots of the largest bucket, 512 MB per GPU by default.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from real_openrlhf.actors.sync.shared_memory import SlotStore, Wait, host_id, nothing_left, slot_bytes

_GPU = " gpu:"
_POLL_S = 1e-4


class Unpaired(ValueError):
    """Policy ranks and engine workers are not on the same GPUs in pairs."""


def place(device: torch.device) -> str:
    """Where a process is: `shared_memory.host_id`, and its GPU's UUID if it has one."""
    return host_id() if device.type == "cpu" else f"{host_id()}{_GPU}{gpu_uuid(device)}"


def host_of(found: str) -> str:
    """The host of a `place`."""
    return found.partition(_GPU)[0]


def gpu_of(found: str) -> str:
    """The GPU of a `place`; "" without one."""
    return found.partition(_GPU)[2]


def gpu_uuid(device: torch.device) -> str:
    """UUID of the physical GPU, whatever number it has in this process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def pair(senders: Sequence[str], receivers: Sequence[str]) -> list[int]:
    """For each receiver, the index of the sender on the same GPU. Both arguments: UUIDs of their GPUs.

    Raises Unpaired for a receiver whose GPU has no sender, and for a GPU with several senders.
    """
    if len(set(senders)) < len(senders) or "" in senders:
        raise Unpaired(f"each policy rank needs its own GPU; theirs are {list(senders)}")
    lonely = sorted({gpu for gpu in receivers if gpu not in senders})
    if lonely:
        raise Unpaired(
            f"engine workers on GPUs {lonely} have no policy rank on the same GPU; the policy's GPUs are "
            f"{list(senders)}. CUDA IPC needs --train.colocate_all and no other engine, such as that of --eval.engine "
            "own; use --sync.backend gloo"
        )
    return [senders.index(gpu) for gpu in receivers]


def wait_for(done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until done; TimeoutError after timeout_s seconds."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not done after {timeout_s:g} s")
        time.sleep(_POLL_S)


class Memory(Protocol):
    """Memory of one device that another process can open. Sizes in bytes, tensors are flat uint8."""

    def gpu(self) -> str:
        """UUID of the device."""

    def allocate(self, size: int) -> Tensor: ...

    def export(self, tensor: Tensor) -> str:
        """A handle that another process can `open`. tensor: from `allocate`."""

    def open(self, handle: str, size: int) -> Tensor:
        """The exporter's memory; unmapped when no tensor uses it any more."""

    def finish(self, timeout_s: float) -> None:
        """Wait until the device has done all work of this process; TimeoutError after timeout_s seconds."""


class CudaIpc:
    """The transport of a `SyncGroup` whose ranks 0 .. senders - 1 are the policy's, the others engine workers.

    A sender without an engine worker on its GPU is `idle`: it has no buffer and sends nothing. Keys of the store:
    "gpu/<rank>"; "senders"; "seen/<rank>", set when the rank has read all of these; "handle/<sender>"; "opened/<rank>";
    and a `SlotStore` per sender.
    """

    ahead = 0

    def __init__(
        self,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        buffer_bytes: int,
        senders: int,
        memory: Memory,
    ) -> None:
        """senders: rank 0's value counts. buffer_bytes: the senders' values count. Receivers read both in the store."""
        self._memory = memory
        self._timeout_s = timeout_s
        self._timeout = timedelta(seconds=timeout_s)
        # Kept alive: rank 0's store is the server for all ranks.
        self._store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=self._timeout)
        if rank == 0:
            self._store.set("senders", str(senders))
        gpus = self._everyones_gpu(rank, world_size)
        senders = int(self._store.get("senders"))
        partners = dict(zip(range(senders, world_size), pair(gpus[:senders], gpus[senders:]), strict=True))
        self._sends = rank < senders
        sender = rank if self._sends else partners[rank]
        readers = [reader for reader, mine in partners.items() if mine == sender]
        self.idle = not readers
        self._slot_bytes = slot_bytes(buffer_bytes)
        self._buffer = self._export(rank, readers) if self._sends else self._open(sender, rank)
        slots = PrefixStore(f"slots/{sender}", self._store)
        self._slots = SlotStore(slots, self._timeout, readers=readers, reader=None if self._sends else rank)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next bucket's memory, as in `SharedMemory.buffer`."""
        size = numel * dtype.itemsize
        if size > self._slot_bytes:
            raise ValueError(f"a bucket of {size} bytes, but the GPU's buffer has slots of {self._slot_bytes}")
        if not self._sends:
            # The kernels that load the bucket before this one must have read it.
            self._memory.finish(self._timeout_s)
        start = self._slots.claim() * self._slot_bytes
        return self._buffer[start : start + size].view(dtype)

    def broadcast(self, tensor: Tensor, src: int) -> Wait:
        """A sender says that the bucket is filled; a receiver waits here until it is. tensor: from `buffer`."""
        if src:
            raise ValueError("by CUDA IPC, every receiver has its own sender")
        if tensor.data_ptr() != self._buffer.data_ptr() + self._slots.slot * self._slot_bytes:
            raise ValueError("CUDA IPC carries the tensors of buffer() only")
        if self._sends:
            # The receiver cannot wait for this process's CUDA stream.
            self._memory.finish(self._timeout_s)
        self._slots.pass_on()
        return nothing_left

    def destroy(self) -> None:
        del self._buffer, self._slots, self._store

    def _everyones_gpu(self, rank: int, world_size: int) -> list[str]:
        self._store.set(f"gpu/{rank}", self._memory.gpu())
        self._store.wait([f"gpu/{other}" for other in range(world_size)], self._timeout)
        gpus = [self._store.get(f"gpu/{other}").decode() for other in range(world_size)]
        self._store.wait(["senders"], self._timeout)
        self._store.set(f"seen/{rank}", "")
        if rank == 0:
            # The server stays until all have read: if a partner is missing, every rank can say so.
            self._store.wait([f"seen/{other}" for other in range(world_size)], self._timeout)
        return gpus

    def _export(self, rank: int, readers: Sequence[int]) -> Tensor:
        if not readers:
            return torch.empty(0, dtype=torch.uint8)
        buffer = self._memory.allocate(2 * self._slot_bytes)
        handle = json.dumps([self._memory.export(buffer), buffer.numel()])
        self._store.set(f"handle/{rank}", handle)
        self._store.wait([f"opened/{reader}" for reader in readers], self._timeout)
        return buffer

    def _open(self, sender: int, rank: int) -> Tensor:
        handle, size = json.loads(self._store.get(f"handle/{sender}"))
        buffer = self._memory.open(handle, size)
        self._slot_bytes = size // 2
        self._store.set(f"opened/{rank}", "")
        return buffer


class _Handle(ctypes.Structure):
    """CUipcMemHandle: 64 bytes, passed by value."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


class _Region:
    """Device memory in a form that torch.as_tensor uses without a copy; freed with its last tensor."""

    def __init__(self, address: int, size: int, give_back: Callable[[int], Any]) -> None:
        # Numba's interface, version 2. Torch keeps this object as long as the tensor exists.
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }
        self._address, self._give_back = address, give_back

    def __del__(self) -> None:
        # At the end of the process the CUDA context may be gone already; then the driver has freed the memory.
        self._give_back(self._address)


class CudaMemory:
    """A GPU's memory by the CUDA driver's own calls, which have not changed since CUDA 11; torch.cuda has none of them.

    Torch's allocator cannot be used. A block of it has an IPC handle only as a part of its segment; expandable segments
    need the right to trace the other process instead; and torch counts references in /dev/shm, which containers do not
    share. In the engine, vLLM's sleep mode replaces the allocator, but memory that is opened here does not use it.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises RuntimeError where there is no CUDA driver (ROCm)."""
        try:
            self._driver: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise RuntimeError(f"no CUDA driver for weights by CUDA IPC ({error}); use --sync.backend gloo") from error
        address, size = ctypes.c_uint64, ctypes.c_size_t
        calls: dict[str, list[Any]] = {
            "cuMemAlloc_v2": [ctypes.POINTER(address), size],
            "cuMemFree_v2": [address],
            "cuIpcGetMemHandle": [ctypes.POINTER(_Handle), address],
            "cuIpcOpenMemHandle_v2": [ctypes.POINTER(address), _Handle, ctypes.c_uint],
            "cuIpcCloseMemHandle": [address],
            "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
        }
        for name, types in calls.items():
            getattr(self._driver, name).argtypes = types
        self.device = device

    def gpu(self) -> str:
        return gpu_uuid(self.device)

    def allocate(self, size: int) -> Tensor:
        # To the driver, memory in torch's cache is not free.
        torch.cuda.empty_cache()
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), size, what=f"{size} bytes of GPU memory for the weight sync")
        return self._tensor(address.value, size, self._driver.cuMemFree_v2)

    def export(self, tensor: Tensor) -> str:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), tensor.data_ptr(), what="a CUDA IPC handle")
        return bytes(handle).hex()

    def open(self, handle: str, size: int) -> Tensor:
        address = ctypes.c_uint64()
        lazy_peer_access = 1  # the only flag that the driver accepts
        there = _Handle.from_buffer_copy(bytes.fromhex(handle))
        what = "opening the CUDA IPC handle of the policy rank on this GPU"
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), there, lazy_peer_access, what=what)
        return self._tensor(address.value, size, self._driver.cuIpcCloseMemHandle)

    def finish(self, timeout_s: float) -> None:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        wait_for(done.query, timeout_s, f"work on {self.device}")

    def _call(self, name: str, *args: Any, what: str) -> None:
        # The driver uses the thread's current context; this makes it the one that torch uses on the device.
        with torch.cuda.device(self.device):
            torch.cuda.current_stream(self.device).synchronize()
            code = getattr(self._driver, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: {name} failed with {code}, {(text.value or b'unknown error').decode()}")

    def _tensor(self, address: int, size: int, give_back: Callable[[int], Any]) -> Tensor:
        return torch.as_tensor(_Region(address, size, give_back), device=self.device)
