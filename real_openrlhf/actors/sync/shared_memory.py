"""Sends buckets of weights through memory that policy and engines have both mapped, on one host.

Rank 0 makes an anonymous file (memfd), which the others open by /proc/<pid>/fd and map. It has no name in any file
system, so nothing is left over, whichever process dies, and the size of /dev/shm does not matter. It holds two slots:
rank 0 fills one while the engines load the other. Through a TCPStore, the ranks tell each other which slot is filled
or free; every wait has a deadline. Torch only.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import Store, TCPStore

_SLOTS = 2
_PAGE = 4096
# Size of a random token at the start of the file, by which the others check that they mapped rank 0's file.
_TOKEN_BYTES = 16
# A transport that starts a broadcast returns this: calling it waits until the broadcast is complete, or raises.
Wait = Callable[[], None]


def nothing_left() -> None:
    """The `Wait` of a broadcast that is already complete."""


def slot_bytes(buffer_bytes: int) -> int:
    """Bytes of a slot that holds buffer_bytes: whole pages."""
    return -(-max(1, buffer_bytes) // _PAGE) * _PAGE


def host_id() -> str:
    """Equal for two processes that can map each other's memory: the same running kernel, process numbering and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} uid:{os.geteuid()}"


class SlotStore:
    """Decides who may use which of two slots: one writer, some readers, and a store whose waits have a deadline.

    Buckets are numbered consecutively over all syncs; bucket n is in slot n % 2. Both sides call `claim`, then
    `pass_on`, for one bucket after the other. Keys of the store: "filled/<n>", bucket n is written;
    "loaded/<n>/<reader>", the reader does not need bucket n any more.
    """

    def __init__(self, store: Store, timeout: timedelta, *, readers: Iterable[int], reader: int | None = None) -> None:
        """readers: all of them. reader: this side's number; None: this side writes."""
        self._store, self._timeout = store, timeout
        self._readers = tuple(readers)
        self._reader = reader
        self._n = 0  # the current bucket
        self._free = _SLOTS  # the writer: buckets below this number have a free slot
        self._given_back = 0  # a reader: buckets below this number have been given back

    @property
    def slot(self) -> int:
        """The current bucket's slot."""
        return self._n % _SLOTS

    def claim(self) -> int:
        """The current bucket's slot. The writer waits until it is free; a reader gives the bucket before back."""
        if self._reader is not None:
            for n in range(self._given_back, self._n):
                self._store.set(f"loaded/{n}/{self._reader}", "")
            self._given_back = self._n
        elif self._n >= self._free:
            self._wait_until_loaded(self._n - _SLOTS)
        return self.slot

    def pass_on(self) -> None:
        """The writer says that the current bucket is filled; a reader waits until it is. Then the next is current."""
        if self._reader is not None:
            self._store.wait([f"filled/{self._n}"], self._timeout)
        else:
            self._store.set(f"filled/{self._n}", "")
        self._n += 1

    def _wait_until_loaded(self, n: int) -> None:
        keys = [f"loaded/{n}/{reader}" for reader in self._readers]
        self._store.wait(keys, self._timeout)
        self._free = n + _SLOTS + 1
        for key in (*keys, f"filled/{n}"):
            self._store.delete_key(key)


class SharedMemory:
    """The transport of a `SyncGroup`; the slots are a `SlotStore`'s.

    Its own keys in the store: "map", where the file is; "mapped/<rank>".
    """

    ahead = 0

    def __init__(
        self, address: str, port: int, rank: int, world_size: int, timeout_s: float, buffer_bytes: int
    ) -> None:
        """buffer_bytes: size of the largest bucket. Returns once all ranks have mapped the memory."""
        self._rank = rank
        self._others = range(1, world_size)
        self._timeout = timedelta(seconds=timeout_s)
        self._slot_bytes = slot_bytes(buffer_bytes)
        # Kept alive: rank 0's store is the server for all ranks.
        self._store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=self._timeout)
        self._memory = self._make() if rank == 0 else self._open()
        self._slots = SlotStore(self._store, self._timeout, readers=self._others, reader=rank or None)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next bucket's memory: rank 0 fills it; for the others it is filled after `broadcast`.

        The tensor of the bucket before must not be used any more. Rank 0 waits until the slot is free.
        """
        size = numel * dtype.itemsize
        if size > self._slot_bytes:
            raise ValueError(f"a bucket of {size} bytes, but the shared memory has slots of {self._slot_bytes}")
        start = _PAGE + self._slots.claim() * self._slot_bytes
        return self._memory[start : start + size].view(dtype)

    def broadcast(self, tensor: Tensor, src: int) -> Wait:
        """Rank 0 says that the bucket is filled; the others wait here until it is. tensor: from `buffer`."""
        if src:
            raise ValueError(f"shared memory is filled by rank 0, not by rank {src}")
        start = self._memory.data_ptr() + _PAGE + self._slots.slot * self._slot_bytes
        if tensor.data_ptr() != start:
            raise ValueError("shared memory carries the tensors of buffer() only")
        self._slots.pass_on()
        return nothing_left

    def destroy(self) -> None:
        del self._memory, self._slots, self._store

    def _make(self) -> Tensor:
        fd = os.memfd_create("real_openrlhf_sync")
        try:
            size = _PAGE + _SLOTS * self._slot_bytes
            # Reserves the memory now: if there is too little, the error comes here, not as a signal during a sync.
            os.posix_fallocate(fd, 0, size)
            memory = _map(fd, size)
            token = secrets.token_bytes(_TOKEN_BYTES)
            memory[:_TOKEN_BYTES] = torch.tensor(list(token), dtype=torch.uint8)
            self._store.set("map", f"{os.getpid()} {fd} {size} {token.hex()}")
            # The descriptor can be closed afterwards, since the mappings keep the memory alive.
            self._store.wait([f"mapped/{rank}" for rank in self._others], self._timeout)
        finally:
            os.close(fd)
        return memory

    def _open(self) -> Tensor:
        pid, number, size, token = self._store.get("map").decode().split()
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        try:
            memory = _map(fd, int(size))
        finally:
            os.close(fd)
        if bytes(memory[:_TOKEN_BYTES].tolist()).hex() != token:
            raise OSError(f"/proc/{pid}/fd/{number} is not the memory of rank 0")
        self._slot_bytes = (int(size) - _PAGE) // _SLOTS
        self._store.set(f"mapped/{self._rank}", "")
        return memory


def _map(fd: int, size: int) -> Tensor:
    """[size] uint8; unmapped when no tensor uses it any more."""
    # MAP_POPULATE: else the first sync would pay for half a million page faults for a few GB.
    return torch.frombuffer(mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), dtype=torch.uint8)
