"""Weights on their way from the policy to the engines: the plan, and the group that carries them.

Both ends use this module, so that they cannot drift apart. Rank 0 is the policy's rank 0, the
engines' workers are ranks 1, 2, ...; every bucket of the plan is one flat broadcast, or one slot
of memory that all have mapped. Torch only: it is imported in vLLM workers, before the model is loaded.

    policy rank 0                                     each engine worker
    plan = make_plan(...)
    engine.receive_weights(to_wire(plan), version) -> receive_bucket(group, bucket) per bucket
    send_bucket(group, bucket, tensors) per bucket
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from real_openrlhf.actors.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The version of an engine before its first complete sync, and after one that failed halfway.
NO_VERSION = -1
T = TypeVar("T")


class SyncError(RuntimeError):
    """A weight sync did not complete. The group is of no use afterwards."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """name: as in the Hugging Face checkpoint. shape: the whole tensor's, not a shard's."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Parameters of one dtype that travel as one flat tensor, in this order."""

    parameters: tuple[Parameter, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.parameters[0].dtype]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def make_plan(named_shapes: Iterable[tuple[str, Sequence[int], str]], bucket_bytes: int) -> list[Bucket]:
    """Cut (name, shape, dtype) triples into buckets of at most bucket_bytes, order kept.

    dtype: a key of DTYPES, as the engine holds the weights (the sender casts). A parameter larger
    than bucket_bytes is a bucket of its own; a change of dtype starts a new one.

    Raises ValueError for unknown dtypes, a name given twice, and bucket_bytes < 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be positive, got {bucket_bytes}")
    buckets: list[Bucket] = []
    open_bucket: list[Parameter] = []
    held = 0
    seen: set[str] = set()
    for name, shape, dtype in named_shapes:
        if dtype not in DTYPES:
            raise ValueError(f"parameter {name!r} has dtype {dtype!r}; weights travel as one of {sorted(DTYPES)}")
        if name in seen:
            raise ValueError(f"parameter {name!r} appears twice in the plan")
        seen.add(name)
        parameter = Parameter(name=name, shape=tuple(int(n) for n in shape), dtype=dtype)
        size = parameter.numel * DTYPES[dtype].itemsize
        if open_bucket and (held + size > bucket_bytes or open_bucket[0].dtype != dtype):
            buckets.append(Bucket(parameters=tuple(open_bucket)))
            open_bucket, held = [], 0
        open_bucket.append(parameter)
        held += size
    if open_bucket:
        buckets.append(Bucket(parameters=tuple(open_bucket)))
    return buckets


def to_wire(plan: Sequence[Bucket]) -> list[list[list[Any]]]:
    """Lists of [name, shape, dtype name]: what passes through collective_rpc unharmed."""
    return [[[p.name, list(p.shape), p.dtype] for p in bucket.parameters] for bucket in plan]


def from_wire(plan: Sequence[Sequence[Sequence[Any]]]) -> list[Bucket]:
    return [
        Bucket(parameters=tuple(Parameter(name=n, shape=tuple(s), dtype=d) for n, s, d in bucket)) for bucket in plan
    ]


def free_port(address: str = "") -> int:
    """A TCP port of this host that is free now, for `SyncGroup.create`."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class _Transport(Protocol):
    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor: ...

    def broadcast(self, tensor: Tensor, src: int) -> None: ...

    def destroy(self) -> None: ...


class SyncGroup:
    """A broadcast group beside the trainers' and the engines' own process groups.

    gloo: every call raises after the deadline. shared_memory: the same, for ranks on one host; a
    bucket is written once and read where it lies. nccl: PyNccl, as OpenRLHF uses it. NCCL itself has
    no deadline; here the host waits for the group's creation in a thread and for each broadcast
    by polling an event, and raises when time is up. The stuck kernel stays on the GPU, so the
    process must then end (which a failed sync makes it do in any case).
    """

    def __init__(self, transport: _Transport, rank: int, world_size: int, device: torch.device) -> None:
        self._transport = transport
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @classmethod
    def create(
        cls,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str,
        timeout_s: float,
        device: torch.device | None = None,
        buffer_bytes: int = 0,
    ) -> SyncGroup:
        """Meet the other ranks; all must call within timeout_s seconds. Rank 0 listens on the port.

        device: where broadcast tensors live; default the current GPU for nccl, else always the CPU.
        buffer_bytes: of the largest bucket; rank 0 must say it for shared_memory.
        Raises SyncError with the address and who was asked for.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of a group of {world_size}")
        where = f"sync group of {world_size} at {address}:{port}, rank {rank}, backend {backend}"
        try:
            if backend == "gloo":
                device = torch.device("cpu")
                transport: _Transport = _Gloo(address, port, rank, world_size, timeout_s)
            elif backend == "shared_memory":
                device = torch.device("cpu")
                transport = SharedMemory(address, port, rank, world_size, timeout_s, buffer_bytes)
            elif backend == "nccl":
                device = device or torch.device("cuda", torch.cuda.current_device())
                transport = _Nccl(address, port, rank, world_size, timeout_s, device)
            else:
                raise ValueError(f"backend must be 'gloo', 'shared_memory' or 'nccl', got {backend!r}")
        except (RuntimeError, OSError, TimeoutError) as error:
            raise SyncError(f"{where}: not formed within {timeout_s:g} s: {error}") from error
        logger.info("%s: formed", where)
        return cls(transport, rank, world_size, device)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Flat memory for the next broadcast, valid until the next call. SyncError after the deadline."""
        try:
            return self._transport.buffer(numel, dtype)
        except (RuntimeError, TimeoutError) as error:
            raise SyncError(f"no memory for {numel} {dtype}: {error}") from error

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        """Fill the contiguous tensor, on the group's device, with rank src's. SyncError after the deadline."""
        try:
            self._transport.broadcast(tensor, src)
        except (RuntimeError, TimeoutError) as error:
            raise SyncError(f"broadcast of {tensor.numel()} {tensor.dtype} from rank {src} failed: {error}") from error

    def destroy(self) -> None:
        self._transport.destroy()


class _Gloo:
    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        self._timeout = timedelta(seconds=timeout_s)
        # Kept: rank 0's store is the server for everyone.
        self._store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=self._timeout)
        # Any: torch's stubs leave out the collectives.
        self._group: Any = ProcessGroupGloo(PrefixStore("real_sync", self._store), rank, world_size, self._timeout)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = src, 0, self._timeout
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        del self._group, self._store


class _Nccl:
    def __init__(
        self, address: str, port: int, rank: int, world_size: int, timeout_s: float, device: torch.device
    ) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        self._timeout_s = timeout_s
        self._device = device
        group = StatelessProcessGroup.create(
            host=address, port=port, rank=rank, world_size=world_size, store_timeout=max(1, int(timeout_s))
        )
        self._comm = _within(timeout_s, "ncclCommInitRank", lambda: PyNcclCommunicator(group, device=device))
        if not self._comm.available:
            raise RuntimeError("the NCCL library could not be loaded")

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self._device)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        stream = torch.cuda.current_stream(tensor.device)
        self._comm.broadcast(tensor, src=src, stream=stream)
        done = torch.cuda.Event()
        done.record(stream)
        deadline = time.monotonic() + self._timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"NCCL broadcast not done after {self._timeout_s:g} s")
            time.sleep(2e-4)

    def destroy(self) -> None:
        self._comm.destroy()


def _within(timeout_s: float, what: str, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError; the thread is left behind, as nothing can interrupt it."""
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


def send_bucket(group: SyncGroup, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
    """Rank 0: broadcast one bucket. tensors: whole (gathered) parameters in the bucket's order."""
    if len(tensors) != len(bucket.parameters):
        raise ValueError(f"the bucket holds {len(bucket.parameters)} parameters, {len(tensors)} tensors were given")
    flat = _buffer(group, bucket)
    for parameter, view, tensor in zip(bucket.parameters, _views(flat, bucket), tensors):
        if tuple(tensor.shape) != parameter.shape:
            raise ValueError(f"{parameter.name} has shape {tuple(tensor.shape)}, the plan says {parameter.shape}")
        view.copy_(tensor.detach())
    _broadcast(group, bucket, flat)


def receive_bucket(group: SyncGroup, bucket: Bucket) -> list[tuple[str, Tensor]]:
    """An engine worker: receive one bucket as (name, view) pairs, valid until the next one is asked for."""
    flat = _buffer(group, bucket)
    _broadcast(group, bucket, flat)
    return [(p.name, view) for p, view in zip(bucket.parameters, _views(flat, bucket))]


def _buffer(group: SyncGroup, bucket: Bucket) -> Tensor:
    with _naming(bucket):
        return group.buffer(bucket.numel, bucket.dtype)


def _broadcast(group: SyncGroup, bucket: Bucket, flat: Tensor) -> None:
    with _naming(bucket):
        group.broadcast(flat, src=0)


@contextmanager
def _naming(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except SyncError as error:
        names = f"{bucket.parameters[0].name} .. {bucket.parameters[-1].name}"
        raise SyncError(f"weights {names}: {error}") from error


def _views(flat: Tensor, bucket: Bucket) -> list[Tensor]:
    parts = flat.split([p.numel for p in bucket.parameters])
    return [part.view(p.shape) for part, p in zip(parts, bucket.parameters)]
