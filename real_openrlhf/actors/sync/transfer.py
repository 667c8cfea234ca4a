"""Transfer of weights from the policy to the engines: the plan, and the group of processes that carries it out.

Both ends use this module, so that they cannot diverge. Rank 0 is the policy's rank 0, the engines' workers are ranks
1, 2, ... A bucket is one or more parameters as one flat tensor. Every bucket of the plan is one broadcast, or one slot
of memory that all ranks have mapped. By CUDA IPC all ranks of the policy send, each to the engine worker on its GPU.
Torch only: this is imported in vLLM workers, before the model is loaded.

    policy rank 0                                     each engine worker
    plan = make_plan(...)
    engine.receive_weights(to_wire(plan), version) -> for bucket, weights in receive_buckets(group, plan)
    send_bucket(group, bucket, tensors) per bucket
    group.flush()                                     group.flush()
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from real_openrlhf.actors.sync.cuda_ipc import CudaIpc, CudaMemory, Unpaired
from real_openrlhf.actors.sync.nccl_broadcast import nccl
from real_openrlhf.actors.sync.shared_memory import SharedMemory, Wait, nothing_left

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The version of an engine before its first complete sync, and after one that failed halfway.
NO_VERSION = -1
BACKENDS = ("gloo", "shared_memory", "ipc", "nccl")


class SyncError(RuntimeError):
    """A weight sync did not complete. The group cannot be used afterwards."""


class _Named(SyncError):
    """A SyncError whose message already names the weights that did not arrive."""


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
    than bucket_bytes is alone in its bucket; a change of dtype starts a new bucket.

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
    """The plan as lists of [name, shape, dtype name], which collective_rpc can transmit."""
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


class Transport(Protocol):
    """Carries the buckets of a `SyncGroup`. Its errors are RuntimeError and TimeoutError."""

    # How many broadcasts may run while the bucket before them is loaded, or the one after them is filled.
    ahead: int

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor: ...

    def broadcast(self, tensor: Tensor, src: int) -> Wait:
        """Start a broadcast; the returned function waits for its end. With ahead 0 it may be complete already."""

    def destroy(self) -> None: ...


class SyncGroup:
    """A group of processes that broadcasts weights; separate from the trainers' and the engines' own process groups.

    gloo           every call raises after the deadline
    shared_memory  the same, for ranks on one host: a bucket is written once, and all read it in place
    ipc            the same in a GPU's memory, for an engine worker and a policy rank on the same GPU (`cuda_ipc`)
    nccl           PyNccl, as OpenRLHF uses it, with two buffers: one travels while the other is filled or loaded

    NCCL itself has no deadline. Here the host waits for the group's creation in a thread, and for each broadcast by
    polling an event, and raises when time is up. The stuck kernel stays on the GPU, so the process must then end; a
    failed sync ends the run anyway.
    """

    def __init__(self, transport: Transport, rank: int, world_size: int, device: torch.device) -> None:
        self._transport = transport
        self._under_way: list[Wait] = []
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
        senders: int = 1,
    ) -> SyncGroup:
        """Form the group: all ranks must call this within timeout_s seconds. Rank 0 listens on the port.

        device: where broadcast tensors are; for nccl and ipc the default is the current GPU, else it is always the CPU.
        buffer_bytes: size of the largest bucket; senders must give it for shared_memory and ipc.
        senders: with ipc, ranks 0 .. senders - 1 are the policy's; rank 0 must give it.
        Raises SyncError, which names address and ranks.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of a group of {world_size}")
        where = f"sync group of {world_size} at {address}:{port}, rank {rank}, backend {backend}"
        try:
            if backend == "gloo":
                device = torch.device("cpu")
                transport: Transport = _Gloo(address, port, rank, world_size, timeout_s)
            elif backend == "shared_memory":
                device = torch.device("cpu")
                transport = SharedMemory(address, port, rank, world_size, timeout_s, buffer_bytes)
            elif backend == "ipc":
                device = device or torch.device("cuda", torch.cuda.current_device())
                memory = CudaMemory(device)
                transport = CudaIpc(address, port, rank, world_size, timeout_s, buffer_bytes, senders, memory)
            elif backend == "nccl":
                device = device or torch.device("cuda", torch.cuda.current_device())
                transport = nccl(address, port, rank, world_size, timeout_s, device)
            else:
                raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        except (RuntimeError, OSError, TimeoutError, Unpaired) as error:
            raise SyncError(f"{where}: not formed within {timeout_s:g} s: {error}") from error
        logger.info("%s: formed", where)
        return cls(transport, rank, world_size, device)

    @property
    def ahead(self) -> bool:
        """Whether a broadcast runs while the next bucket is filled, or the one before it is loaded."""
        return self._transport.ahead > 0

    @property
    def idle(self) -> bool:
        """Whether no engine worker receives from this rank."""
        return bool(getattr(self._transport, "idle", False))

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Flat memory for the next broadcast. SyncError after the deadline.

        It is valid until the next call, or the one after that for a group with `ahead`.
        """
        while len(self._under_way) > self._transport.ahead:
            self._under_way[0]()
        with _failing(f"no memory for {numel} {dtype}"):
            return self._transport.buffer(numel, dtype)

    def begin(self, tensor: Tensor, src: int = 0, names: str = "") -> Wait:
        """Start a `broadcast` and return a function that waits for its end. Without `ahead` it is complete already.

        names: of the weights, for errors that come later.
        """
        what = f"broadcast of {tensor.numel()} {tensor.dtype} from rank {src} failed"
        with _failing(what):
            broadcast = _Started(self._transport.broadcast(tensor, src), what, names, self._under_way)
        if not self._transport.ahead:
            broadcast()
        return broadcast

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        """Fill the contiguous tensor, on the group's device, with rank src's values. SyncError after the deadline."""
        self.begin(tensor, src)()

    def flush(self) -> None:
        """Wait for all started broadcasts, then free the buffers of the sync. SyncError after the deadline."""
        while self._under_way:
            self._under_way[0]()
        flush = getattr(self._transport, "flush", None)
        if flush is not None:
            flush()

    def destroy(self) -> None:
        self._transport.destroy()


class _Started:
    """A broadcast that was started. Calling this waits for its end; further calls return at once."""

    def __init__(self, wait: Wait, what: str, names: str, all_of_them: list[Wait]) -> None:
        self._wait, self._what, self._names, self._all = wait, what, names, all_of_them
        self._all.append(self)

    def __call__(self) -> None:
        if self in self._all:
            self._all.remove(self)
            try:
                self._wait()
            except (RuntimeError, TimeoutError) as error:
                text = f"{self._what}: {error}"
                raise (_Named(f"{self._names}: {text}") if self._names else SyncError(text)) from error


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        raise SyncError(f"{what}: {error}") from error


class _Gloo:
    ahead = 0

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        self._timeout = timedelta(seconds=timeout_s)
        # Kept alive: rank 0's store is the server for all ranks.
        self._store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=self._timeout)
        # Typed as Any: torch's stubs leave out the collectives.
        self._group: Any = ProcessGroupGloo(PrefixStore("real_sync", self._store), rank, world_size, self._timeout)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def broadcast(self, tensor: Tensor, src: int) -> Wait:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = src, 0, self._timeout
        self._group.broadcast([tensor], options).wait()
        return nothing_left

    def destroy(self) -> None:
        del self._group, self._store


def send_bucket(group: SyncGroup, bucket: Bucket, tensors: Sequence[Tensor]) -> None:
    """On a policy rank: broadcast one bucket. tensors: complete (gathered) parameters in the bucket's order.

    The broadcast may still run on return (see `SyncGroup.flush`), but the tensors are not needed any more.
    """
    if group.idle:
        return
    if len(tensors) != len(bucket.parameters):
        raise ValueError(f"the bucket holds {len(bucket.parameters)} parameters, {len(tensors)} tensors were given")
    with _naming(bucket):
        flat = group.buffer(bucket.numel, bucket.dtype)
    for parameter, view, tensor in zip(bucket.parameters, _views(flat, bucket), tensors):
        if tuple(tensor.shape) != parameter.shape:
            raise ValueError(f"{parameter.name} has shape {tuple(tensor.shape)}, the plan says {parameter.shape}")
        view.copy_(tensor.detach())
    with _naming(bucket):
        group.begin(flat, names=_names(bucket))


def receive_bucket(group: SyncGroup, bucket: Bucket) -> list[tuple[str, Tensor]]:
    """In an engine worker: receive one bucket as (name, view) pairs, valid until the next one is asked for."""
    flat, wait = _expect(group, bucket)
    return _received(bucket, flat, wait)


def receive_buckets(group: SyncGroup, plan: Sequence[Bucket]) -> Iterator[tuple[Bucket, list[tuple[str, Tensor]]]]:
    """In an engine worker: all buckets in turn, each valid until the next one is asked for.

    With `ahead`, the next bucket arrives while the caller loads the current one.
    """
    if not group.ahead:
        for bucket in plan:
            yield bucket, receive_bucket(group, bucket)
        return
    coming = [_expect(group, bucket) for bucket in plan[:1]]
    for i, bucket in enumerate(plan):
        coming += [_expect(group, following) for following in plan[i + 1 : i + 2]]
        yield bucket, _received(bucket, *coming.pop(0))


def _expect(group: SyncGroup, bucket: Bucket) -> tuple[Tensor, Wait]:
    with _naming(bucket):
        flat = group.buffer(bucket.numel, bucket.dtype)
        return flat, group.begin(flat, names=_names(bucket))


def _received(bucket: Bucket, flat: Tensor, wait: Wait) -> list[tuple[str, Tensor]]:
    with _naming(bucket):
        wait()
    return [(p.name, view) for p, view in zip(bucket.parameters, _views(flat, bucket))]


@contextmanager
def _naming(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except _Named:
        raise  # the error is about an earlier bucket, which it names already
    except SyncError as error:
        raise _Named(f"{_names(bucket)}: {error}") from error


def _names(bucket: Bucket) -> str:
    return f"weights {bucket.parameters[0].name} .. {bucket.parameters[-1].name}"


def _views(flat: Tensor, bucket: Bucket) -> list[Tensor]:
    parts = flat.split([p.numel for p in bucket.parameters])
    return [part.view(p.shape) for part, p in zip(parts, bucket.parameters)]
