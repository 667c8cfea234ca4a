"""Weights inside a shared GPU, with anonymous files for its memory, and the driver's calls against a stand-in."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.actors.sync import cuda_ipc
from real_openrlhf.actors.sync.cuda_ipc import (
    CudaIpc,
    CudaMemory,
    Memory,
    Unpaired,
    gpu_of,
    host_of,
    pair,
    place,
    wait_for,
)
from real_openrlhf.actors.sync.shared_memory import host_id
from real_openrlhf.actors.sync.transfer import (
    Bucket,
    SyncError,
    SyncGroup,
    free_port,
    make_plan,
    receive_buckets,
    send_bucket,
)
from tests.helpers.memfd_memory import MemfdMemory

LARGEST = 4096 * 3  # bytes of a slot
CPU = torch.device("cpu")


def join(port: int, rank: int, gpus: list[str], senders: int, timeout_s: float = 2.0, memory: Any = None) -> SyncGroup:
    """gpus: of all ranks, senders first."""
    memory = memory or MemfdMemory(gpus[rank])
    size = LARGEST if rank < senders else 0  # a receiver is told
    transport = CudaIpc("127.0.0.1", port, rank, len(gpus), timeout_s, size, senders if rank == 0 else 0, memory)
    return SyncGroup(transport, rank, len(gpus), CPU)


def joined(pool: ThreadPoolExecutor, gpus: list[str], senders: int, memories: dict[int, Memory] | None = None) -> Any:
    port = free_port()
    there = memories or {}
    ranks = [pool.submit(join, port, r, gpus, senders, memory=there.get(r)) for r in range(len(gpus))]
    return [rank.result() for rank in ranks]


def plan_of(tensors: dict[str, Tensor]) -> list[Bucket]:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    return make_plan([(n, t.shape, names[t.dtype]) for n, t in tensors.items()], LARGEST)


def send(group: SyncGroup, plan: list[Bucket], tensors: dict[str, Tensor]) -> None:
    for bucket in plan:
        send_bucket(group, bucket, [tensors[p.name] for p in bucket.parameters])
    group.flush()


def receive(group: SyncGroup, plan: list[Bucket]) -> dict[str, Tensor]:
    return {name: view.clone() for _, weights in receive_buckets(group, plan) for name, view in weights}


def ragged(seed: int) -> dict[str, Tensor]:
    """Odd sizes, a scalar, a transposed one, two dtypes; a bucket that fills its slot exactly."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(3, 7, generator=generator).t(),
        "b": torch.randn(LARGEST // 4, generator=generator),
        "c": torch.randn(1021, generator=generator).bfloat16(),
        "d": torch.randn((), generator=generator).bfloat16(),
    }
    return tensors | {f"e{i}": torch.randn(501 + i, generator=generator) for i in range(20)}


@pytest.mark.parametrize(
    ("senders", "receivers"),
    [(["A"], ["A"]), (["A", "B"], ["B", "A"]), (["A", "B", "C"], ["C"]), (["A", "B"], ["B", "A", "B"])],
    ids=["one GPU", "two GPUs", "ranks without an engine", "two workers on a GPU"],
)
def test_every_worker_gets_the_weights_of_the_rank_on_its_gpu(senders: list[str], receivers: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        groups = joined(pool, senders + receivers, len(senders))
        assert [group.idle for group in groups[: len(senders)]] == [gpu not in receivers for gpu in senders]
        for version in range(3):
            # In earnest all ranks have the same weights; here they differ, so that a wrong pair shows.
            sent = [ragged(10 * version + i) for i in range(len(senders))]
            plan = plan_of(sent[0])
            assert len(plan) > 5 and plan[1].nbytes == LARGEST
            got = [pool.submit(receive, group, plan) for group in groups[len(senders) :]]
            sending = [pool.submit(send, group, plan, mine) for group, mine in zip(groups, sent)]
            for future, gpu in zip(got, receivers, strict=True):
                wanted, found = sent[senders.index(gpu)], future.result()
                assert list(found) == list(wanted)
                assert all(found[name].equal(tensor) for name, tensor in wanted.items())
            for done in sending:
                done.result()
        for group in groups:
            group.destroy()


def test_the_next_bucket_is_written_while_one_is_loaded_and_no_later_one() -> None:
    tensors = {str(i): torch.full((LARGEST // 4,), float(i)) for i in range(3)}
    plan = plan_of(tensors)
    with ThreadPoolExecutor(3) as pool:
        sender, receiver = joined(pool, ["A", "A"], 1)
        send_bucket(sender, plan[0], [tensors["0"]])
        arriving = receive_buckets(receiver, plan)
        ((_, first),) = next(arriving)[1]
        send_bucket(sender, plan[1], [tensors["1"]])  # returns, although the first is still being loaded
        future: Future[None] = pool.submit(send_bucket, sender, plan[2], [tensors["2"]])
        time.sleep(0.2)
        assert not future.done() and bool((first == 0).all())
        ((_, second),) = next(arriving)[1]  # gives the first back
        future.result()
        assert bool((second == 1).all())


class Late(MemfdMemory):
    """A GPU: what a process asks of it happens when that process waits for it."""

    def __init__(self, gpu: str) -> None:
        super().__init__(gpu)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def allocate(self, size: int) -> Tensor:
        there, asked = super().allocate(size), torch.zeros(size, dtype=torch.uint8)
        self._files[asked.data_ptr()] = self._files.pop(there.data_ptr())
        self.pairs.append((there, asked))
        return asked

    def finish(self, timeout_s: float) -> None:
        for there, asked in self.pairs:
            there.copy_(asked)


def test_a_bucket_is_filled_once_the_gpu_is_done() -> None:
    tensors = ragged(0)
    plan = plan_of(tensors)
    with ThreadPoolExecutor(3) as pool:
        sender, receiver = joined(pool, ["A", "A"], 1, {0: Late("A")})
        sending = pool.submit(send, sender, plan, tensors)
        found = receive(receiver, plan)
        sending.result()
    assert all(found[name].equal(tensor) for name, tensor in tensors.items())


def test_a_bucket_is_given_back_once_the_gpu_is_done() -> None:
    class Asked(MemfdMemory):
        """Notes which buckets were given back whenever the receiver waits for its GPU."""

        def __init__(self, gpu: str) -> None:
            super().__init__(gpu)
            self.given_back: list[list[int]] = []
            self.store: Any = None

        def finish(self, timeout_s: float) -> None:
            if self.store is not None:
                self.given_back.append([n for n in range(3) if self.store.check([f"slots/0/loaded/{n}/1"])])

    memory = Asked("A")
    tensors = {str(i): torch.full((LARGEST // 4,), float(i)) for i in range(2)}
    plan = plan_of(tensors)
    with ThreadPoolExecutor(3) as pool:
        sender, receiver = joined(pool, ["A", "A"], 1, {1: memory})
        memory.store = receiver._transport._store
        send(sender, plan, tensors)
        receive(receiver, plan)
        assert memory.given_back == [[], []]  # before the first bucket; before the second, with the first loaded
        assert memory.store.check(["slots/0/loaded/0/1"])


def test_a_worker_without_a_rank_on_its_gpu_is_named_on_every_side() -> None:
    gpus, port = ["A", "B", "A", "X"], free_port()
    with ThreadPoolExecutor(4) as pool:
        for rank in [pool.submit(join, port, rank, gpus, 2) for rank in range(4)]:
            with pytest.raises(
                Unpaired, match=r"on GPUs \['X'\] .* policy's GPUs are \['A', 'B'\].*--sync.backend gloo"
            ):
                rank.result()


def test_who_pairs_with_whom() -> None:
    assert pair(["A", "B"], ["B", "A", "B"]) == [1, 0, 1]
    assert pair(["A"], []) == []
    for twice in (["A", "A"], ["A", ""]):
        with pytest.raises(Unpaired, match="its own GPU"):
            pair(twice, ["A"])


def test_every_wait_has_a_deadline() -> None:
    tensors = {str(i): torch.zeros(LARGEST // 4) for i in range(3)}
    plan = plan_of(tensors)
    with ThreadPoolExecutor(3) as pool:
        sender, receiver = joined(pool, ["A", "A"], 1)
        with pytest.raises(SyncError, match=r"weights 0 \.\. 0: broadcast of"):
            next(receive_buckets(receiver, plan))  # nobody sends
        with pytest.raises(SyncError, match=r"weights 2 \.\. 2: no memory"):
            send(sender, plan, tensors)  # nobody loads
    with pytest.raises((RuntimeError, TimeoutError)):
        join(free_port(), 0, ["A", "A"], 1, timeout_s=0.5)
    with pytest.raises(TimeoutError, match=r"the copy not done after 0\.01 s"):
        wait_for(lambda: False, 0.01, "the copy")


def test_what_does_not_fit_or_is_not_its_memory_is_refused() -> None:
    with ThreadPoolExecutor(2) as pool:
        sender, _ = joined(pool, ["A", "A"], 1)
        with pytest.raises(ValueError, match=f"{LARGEST + 4} bytes, but the GPU's buffer has slots of {LARGEST}"):
            sender.buffer(LARGEST // 4 + 1, torch.float32)
        sender.buffer(3, torch.float32)
        with pytest.raises(ValueError, match=r"buffer\(\) only"):
            sender.broadcast(torch.zeros(3))


CHILD = """
import sys, time, torch
from tests.unit.actors.sync.test_cuda_ipc import join
group = join(int(sys.argv[1]), int(sys.argv[2]), ["A", "A"], 1)
buffer = group.buffer(2048, torch.float32)
if int(sys.argv[2]) == 0:
    buffer.fill_(7.0)
    group.broadcast(buffer)
else:
    group.broadcast(buffer)
    assert bool((buffer == 3.0).all())
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("dies", [0, 1], ids=["sender", "receiver"])
def test_another_process_that_is_killed_meets_the_deadline(dies: int) -> None:
    port = free_port()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(port), str(dies)], stdout=subprocess.PIPE, text=True)
    try:
        group = join(port, 1 - dies, ["A", "A"], 1, timeout_s=20.0)  # the child imports first
        buffer = group.buffer(2048, torch.float32)
        if dies == 1:
            buffer.fill_(3.0)
        group.broadcast(buffer)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.kill()
        child.wait()
        assert bool((buffer == (7.0 if dies == 0 else 3.0)).all())
        # The sender's store is gone with it; a dead receiver is waited for until the deadline.
        group._transport._slots._timeout = cuda_ipc.timedelta(seconds=0.5)  # type: ignore[attr-defined]
        with pytest.raises(SyncError):
            for _ in range(3):
                group.broadcast(group.buffer(2048, torch.float32))
    finally:
        child.kill()
        child.wait()


def test_a_place_is_a_host_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(CPU) == host_of(place(CPU)) == host_id() and gpu_of(place(CPU)) == ""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0a-1b"))
    there = place(torch.device("cuda", 3))
    assert host_of(there) == host_id() and gpu_of(there) == "0a-1b"


class Driver:
    """libcuda.so.1 by Python: memory of this process, of which a handle holds the address."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.calls: list[str] = []
        for name in (n for n in dir(self) if n.startswith("_cu")):
            call = getattr(self, name)
            # As a ctypes function, it takes attributes.
            setattr(self, name[1:], type("Call", (), {"__call__": staticmethod(call)})())

    def _cuMemAlloc_v2(self, out: Any, size: int) -> int:
        self.calls.append("allocate")
        if size > 2**20:
            return 2
        memory = ctypes.create_string_buffer(size)
        out._obj.value = ctypes.addressof(memory)
        self.held[out._obj.value] = memory
        return 0

    def _cuMemFree_v2(self, address: int) -> int:
        self.calls.append("free")
        del self.held[address]
        return 0

    def _cuIpcGetMemHandle(self, out: Any, address: int) -> int:
        raw = b"\0\1\0" + address.to_bytes(8, "little") + b"\0" * 52 + b"\7"
        ctypes.memmove(ctypes.addressof(out._obj), raw, 64)
        return 0

    def _cuIpcOpenMemHandle_v2(self, out: Any, handle: Any, flags: int) -> int:
        raw = bytes(handle)
        assert raw[:3] == b"\0\1\0" and raw[63] == 7 and flags == 1
        self.calls.append("open")
        out._obj.value = int.from_bytes(raw[3:11], "little")
        return 0

    def _cuIpcCloseMemHandle(self, address: int) -> int:
        self.calls.append("close")
        return 0

    def _cuGetErrorString(self, code: int, out: Any) -> int:
        out._obj.value = {2: b"out of memory"}.get(code)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()

    def as_tensor(region: Any, device: Any) -> Tensor:
        """As torch does with this interface: no copy, and the region lives as long as the tensor."""
        spec = region.__cuda_array_interface__
        assert spec["typestr"] == "|u1" and spec["data"][1] is False
        array: Any = (ctypes.c_uint8 * spec["shape"][0]).from_address(spec["data"][0])
        array.region = region
        return torch.frombuffer(array, dtype=torch.uint8)

    stream = SimpleNamespace(synchronize=lambda: made.calls.append("context"))
    monkeypatch.setattr(cuda_ipc.ctypes, "CDLL", lambda name: made if name == "libcuda.so.1" else None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: ThreadPoolExecutor(1))  # any context manager
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.calls.append("empty"))
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    yield made


def test_the_driver_s_memory_is_opened_and_given_back(driver: Driver) -> None:
    memory = CudaMemory(torch.device("cuda", 0))
    mine = memory.allocate(4096)
    mine.copy_(torch.arange(4096) % 251)
    theirs = memory.open(memory.export(mine), 4096)
    assert theirs.equal(mine) and theirs.data_ptr() == mine.data_ptr()
    # torch's cache is given up before memory is asked for, and every call has torch's context.
    assert driver.calls == ["empty", "context", "allocate", "context", "context", "open"]
    view = theirs[:8]
    del theirs
    assert "close" not in driver.calls
    del view, mine
    assert driver.calls[-2:] == ["close", "free"] and not driver.held


def test_the_driver_s_errors_are_told(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CudaMemory(torch.device("cuda", 0))
    with pytest.raises(
        RuntimeError, match=r"2097152 bytes of GPU memory .*: cuMemAlloc_v2 failed with 2, out of memory"
    ):
        memory.allocate(2**21)

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_ipc.ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"no CUDA driver .*libcuda.so.1.*; use --sync.backend gloo"):
        CudaMemory(torch.device("cuda", 0))
