"""Two buckets of a sync under way at once, with a wire that a test opens and shuts in the place of NCCL."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.actors.sync.nccl_broadcast import DoubleBuffered, nccl
from real_openrlhf.actors.sync.transfer import Bucket, SyncError, SyncGroup, make_plan, receive_buckets, send_bucket

CPU = torch.device("cpu")
SIZE = 64  # elements of a bucket


class Wire:
    """One rank's end: broadcasts start in order, and each is done when the test says so."""

    def __init__(self, arrives: Callable[[int], float] = float) -> None:
        """arrives: what a receiver finds in bucket n."""
        self.log: list[str] = []
        self.tensors: list[Tensor] = []
        self.through: list[threading.Event] = []
        self.arrives = arrives

    def group(self, rank: int, timeout_s: float = 20.0) -> SyncGroup:
        return SyncGroup(DoubleBuffered(self.begin, CPU, timeout_s), rank, 2, CPU)

    def begin(self, tensor: Tensor, src: int) -> Callable[[], bool]:
        self.log.append(f"begin {len(self.tensors)}")
        self.tensors.append(tensor)
        self.through.append(threading.Event())
        return self.through[-1].is_set

    def finish(self, n: int, fill: bool = False) -> None:
        if fill:
            self.tensors[n].fill_(self.arrives(n))
        self.through[n].set()


def plan_of(n: int) -> list[Bucket]:
    return make_plan([(str(i), (SIZE,), "float32") for i in range(n)], 4 * SIZE)


def send(group: SyncGroup, bucket: Bucket, value: float) -> None:
    send_bucket(group, bucket, [torch.full((SIZE,), value)])


def test_a_bucket_is_filled_while_one_is_under_way_and_no_more() -> None:
    wire, plan = Wire(), plan_of(4)
    group = wire.group(0)
    send(group, plan[0], 0.0)
    send(group, plan[1], 1.0)  # returns, although the first is under way
    assert wire.log == ["begin 0", "begin 1"] and not any(event.is_set() for event in wire.through)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(send, group, plan[2], 2.0)
        time.sleep(0.1)
        assert not third.done() and bool((wire.tensors[0] == 0).all())  # its memory is still on the wire
        wire.finish(0)
        third.result()
        assert bool((wire.tensors[2] == 2).all()) and wire.tensors[2].data_ptr() == wire.tensors[0].data_ptr()
        assert bool((wire.tensors[1] == 1).all())
        wire.finish(1)
        end = pool.submit(group.flush)
        time.sleep(0.1)
        assert not end.done()  # the last one counts too
        wire.finish(2)
        end.result()


def test_a_bucket_is_loaded_while_the_next_one_arrives() -> None:
    wire, plan = Wire(lambda n: 10.0 + n), plan_of(3)
    buckets = receive_buckets(wire.group(1), plan)
    with ThreadPoolExecutor(1) as pool:
        for n in range(3):
            coming = pool.submit(next, buckets)
            time.sleep(0.05)
            assert not coming.done()  # it has not arrived
            wire.finish(n, fill=True)
            bucket, ((name, view),) = coming.result()
            wire.log.append(f"load {n}")
            assert bucket == plan[n] and name == str(n) and bool((view == 10.0 + n).all())
            if n < 2:
                # The next one may arrive now and leaves the one that is being loaded as it is.
                wire.tensors[n + 1].fill_(-1.0)
                assert bool((view == 10.0 + n).all())
    assert next(buckets, None) is None
    assert wire.log == ["begin 0", "begin 1", "load 0", "begin 2", "load 1", "load 2"]


def test_ragged_buckets_arrive_as_sent_sync_after_sync() -> None:
    """Both ends at their own pace; a queue carries copies, as the wire would."""
    queue: Queue[Tensor] = Queue()
    pace = random.Random(0)
    sending, receiving = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # each end's stream: one thing after the other

    def put(tensor: Tensor, src: int) -> Callable[[], bool]:
        def work() -> None:
            time.sleep(0.003 * pace.random())
            queue.put(tensor.clone())

        return sending.submit(work).done

    def take(tensor: Tensor, src: int) -> Callable[[], bool]:
        def work() -> None:
            got = queue.get(timeout=20)
            time.sleep(0.003 * pace.random())
            tensor.copy_(got)

        return receiving.submit(work).done

    sender = SyncGroup(DoubleBuffered(put, CPU, 20.0), 0, 2, CPU)
    receiver = SyncGroup(DoubleBuffered(take, CPU, 20.0), 1, 2, CPU)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"p{i}": torch.randn(1 + 37 * i % 101, generator=generator) for i in range(40)}
    tensors |= {f"q{i}": torch.randn(5, 1 + i, generator=generator).bfloat16() for i in range(9)}
    plan = make_plan([(n, t.shape, str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()], 300)
    assert len(plan) > 20

    def receive() -> dict[str, Tensor]:
        found = {}
        for _, weights in receive_buckets(receiver, plan):
            time.sleep(0.002 * pace.random())
            found.update({name: view.clone() for name, view in weights})
        receiver.flush()
        return found

    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            future = pool.submit(receive)
            for bucket in plan:
                send_bucket(sender, bucket, [tensors[p.name] for p in bucket.parameters])
            sender.flush()
            found = future.result()
            assert list(found) == list(tensors) and all(found[name].equal(t) for name, t in tensors.items())
            tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    sending.shutdown()
    receiving.shutdown()


def test_every_wait_has_a_deadline_and_names_its_own_weights() -> None:
    wire, plan = Wire(), plan_of(3)
    group = wire.group(0, timeout_s=0.05)
    for n in (0, 1):
        send(group, plan[n], 0.0)
    # The third one's memory is waited for; what hangs is the first.
    with pytest.raises(SyncError, match=r"^weights 0 \.\. 0: .*NCCL broadcast not done after 0\.05 s"):
        send(group, plan[2], 0.0)
    with pytest.raises(SyncError, match=r"^weights 1 \.\. 1: .*NCCL broadcast not done"):
        group.flush()
    with pytest.raises(SyncError, match=r"^weights 0 \.\. 0: .*NCCL broadcast not done"):
        next(receive_buckets(Wire().group(1, timeout_s=0.05), plan))


def test_memory_is_held_during_a_sync_only() -> None:
    wire, plan = Wire(), plan_of(2)
    transport = DoubleBuffered(wire.begin, CPU, 1.0, close=lambda: wire.log.append("closed"))
    group = SyncGroup(transport, 0, 2, CPU)
    for n in (0, 1):
        send(group, plan[n], 0.0)
        wire.finish(n)
    assert len(transport._slots) == 2
    group.flush()
    assert not transport._slots
    group.destroy()
    assert wire.log[-1] == "closed"


def test_nccl_runs_on_a_stream_behind_what_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    done = threading.Event()

    class Event:
        def record(self, stream: Any) -> None:
            log.append(("record", stream.name))

        def query(self) -> bool:
            return done.is_set()

    side = SimpleNamespace(name="side", wait_stream=lambda stream: log.append(("wait", stream.name)))
    cuda = SimpleNamespace(
        Stream=lambda device: side,
        Event=Event,
        current_stream=lambda device: SimpleNamespace(name="current"),
        current_device=lambda: 3,
        set_device=lambda device: log.append(("device", device)),
    )

    class Communicator:
        available = True

        def __init__(self, group: str, device: torch.device) -> None:
            assert group == "host:5 of 2"

        def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
            log.append(("broadcast", src, stream.name))

        def destroy(self) -> None:
            log.append(("destroy",))

    def create(**asked: Any) -> str:
        assert asked["rank"] == 1 and asked["store_timeout"] == 9
        return f"{asked['host']}:{asked['port']} of {asked['world_size']}"

    monkeypatch.setattr(torch, "cuda", cuda)
    for name, there in {
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": Communicator},
        "vllm.distributed.utils": {"StatelessProcessGroup": SimpleNamespace(create=create)},
    }.items():
        module = ModuleType(name)
        vars(module).update(there)
        monkeypatch.setitem(sys.modules, name, module)
    for package in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    transport = nccl("host", 5, 1, 2, 9.5, CPU)
    assert log == [("device", 3)]  # the thread that forms the group has this one's device
    wait = transport.broadcast(torch.zeros(1), 0)
    assert log[1:] == [("wait", "current"), ("broadcast", 0, "side"), ("record", "side")]
    done.set()
    wait()
    transport.destroy()
    assert log[-1] == ("destroy",)
    Communicator.available = False
    with pytest.raises(RuntimeError, match="NCCL library could not be loaded"):
        nccl("host", 5, 1, 2, 9.5, CPU)
