"""Weights through mapped memory: two ranks in two threads, or in two processes of which one dies."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from real_openrlhf.actors.sync import shared_memory
from real_openrlhf.actors.sync.shared_memory import host_id
from real_openrlhf.actors.sync.transfer import (
    Bucket,
    SyncError,
    SyncGroup,
    free_port,
    make_plan,
    receive_bucket,
    send_bucket,
)

LARGEST = 4096 * 3  # bytes of a slot


def join(port: int, rank: int, world: int, timeout_s: float = 1.0) -> SyncGroup:
    return SyncGroup.create("127.0.0.1", port, rank, world, "shared_memory", timeout_s, buffer_bytes=LARGEST)


@pytest.fixture
def groups() -> Iterator[tuple[SyncGroup, SyncGroup, ThreadPoolExecutor]]:
    """Sender and receiver, with a deadline of one second."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        sender, receiver = (f.result() for f in [pool.submit(join, port, rank, 2) for rank in (0, 1)])
        yield sender, receiver, pool
    sender.destroy()
    receiver.destroy()


def in_memory() -> set[str]:
    """Names in /dev/shm, without those that another living process has mapped: other runs may go on here."""
    names = set(os.listdir("/dev/shm"))
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if maps.parent.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                names -= {line.rpartition("/dev/shm/")[2] for line in maps.read_text().splitlines()}
    return names


def n_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("real_openrlhf_sync")


def plan_of(tensors: dict[str, torch.Tensor]) -> list[Bucket]:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return make_plan([(n, t.shape, names[t.dtype]) for n, t in tensors.items()], LARGEST)


def test_every_bit_of_every_tensor_arrives_sync_after_sync(groups: Any) -> None:
    sender, receiver, pool = groups
    generator = torch.Generator().manual_seed(0)
    # Odd sizes, a scalar, a transposed one, three dtypes; a bucket that fills its slot exactly.
    tensors = {
        "a": torch.randn(3, 7, generator=generator).t(),
        "b": torch.randn(LARGEST // 4, generator=generator),
        "c": torch.randn(1021, generator=generator).bfloat16(),
        "d": torch.tensor(2.5).half(),
        **{f"e{i}": torch.randn(501 + i, generator=generator) for i in range(30)},
    }
    tensors["a"][0, 0], tensors["c"][3] = float("nan"), float("-inf")
    plan = plan_of(tensors)
    assert len(plan) > 6 and plan[1].nbytes == LARGEST

    def receive() -> dict[str, torch.Tensor]:
        return {name: view.clone() for bucket in plan for name, view in receive_bucket(receiver, bucket)}

    for _ in range(3):
        future = pool.submit(receive)
        for bucket in plan:
            send_bucket(sender, bucket, [tensors[p.name] for p in bucket.parameters])
        got = future.result()
        assert list(got) == list(tensors)
        for name, tensor in tensors.items():
            assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
            bits = torch.int32 if tensor.dtype == torch.float32 else torch.int16
            assert torch.equal(got[name].contiguous().view(bits), tensor.contiguous().view(bits)), name
        tensors = {name: tensor * 2 for name, tensor in tensors.items()}


def test_the_next_bucket_is_written_while_one_is_loaded_and_no_later_one(groups: Any) -> None:
    sender, receiver, pool = groups
    tensors = {str(i): torch.full((LARGEST // 4,), float(i)) for i in range(3)}
    plan = plan_of(tensors)
    assert len(plan) == 3

    def send(i: int) -> None:
        send_bucket(sender, plan[i], [tensors[str(i)]])

    send(0)
    ((_, first),) = receive_bucket(receiver, plan[0])
    send(1)  # returns, although the first is still being loaded
    future: Future[None] = pool.submit(send, 2)
    time.sleep(0.2)
    assert not future.done() and bool((first == 0).all())
    ((_, second),) = receive_bucket(receiver, plan[1])  # gives the first back
    future.result()
    assert bool((second == 1).all())
    assert bool((receive_bucket(receiver, plan[2])[0][1] == 2).all())


def test_several_receivers_each_hold_a_slot() -> None:
    port, tensors = free_port(), {str(i): torch.full((LARGEST // 4,), float(i)) for i in range(8)}
    plan = plan_of(tensors)

    def receive(rank: int) -> list[float]:
        group, got = join(port, rank, 3), []
        for bucket in plan:
            ((_, view),) = receive_bucket(group, bucket)
            time.sleep(0.02 * (rank - 1))  # one of them is slow
            assert bool((view == view[0]).all())
            got.append(float(view[0]))
        return got

    with ThreadPoolExecutor(2) as pool:
        receivers = [pool.submit(receive, rank) for rank in (1, 2)]
        sender = join(port, 0, 3)
        for i, bucket in enumerate(plan):
            send_bucket(sender, bucket, [tensors[str(i)]])
        assert [f.result() for f in receivers] == [[float(i) for i in range(8)]] * 2


def test_every_wait_has_a_deadline(groups: Any) -> None:
    sender, receiver, _ = groups
    plan = plan_of({str(i): torch.zeros(LARGEST // 4) for i in range(3)})
    with pytest.raises(SyncError, match=r"weights 0 \.\. 0"):
        receive_bucket(receiver, plan[0])  # nobody sends
    for bucket in plan[:2]:
        send_bucket(sender, bucket, [torch.zeros(LARGEST // 4)])
    with pytest.raises(SyncError, match=r"weights 2 \.\. 2"):
        send_bucket(sender, plan[2], [torch.zeros(LARGEST // 4)])  # nobody loads
    with pytest.raises(SyncError, match=r"rank 0, backend shared_memory: not formed within 0\.5 s"):
        join(free_port(), 0, 2, 0.5)


def test_a_tensor_of_a_wrong_shape_leaves_the_group_as_it_was(groups: Any) -> None:
    sender, receiver, _ = groups
    (bucket,) = plan_of({"w": torch.zeros(2, 3)})
    for _ in range(3):
        with pytest.raises(ValueError, match=r"w has shape \(3, 2\)"):
            send_bucket(sender, bucket, [torch.zeros(3, 2)])
    send_bucket(sender, bucket, [torch.ones(2, 3)])
    assert bool((receive_bucket(receiver, bucket)[0][1] == 1).all())


def test_what_does_not_fit_or_is_not_its_memory_is_refused(groups: Any) -> None:
    sender, _, _ = groups
    with pytest.raises(ValueError, match=f"{LARGEST + 4} bytes, but the shared memory has slots of {LARGEST}"):
        sender.buffer(LARGEST // 4 + 1, torch.float32)
    with pytest.raises(ValueError, match=r"buffer\(\) only"):
        sender.broadcast(torch.zeros(3))


def test_memory_that_the_host_does_not_have_is_an_error_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, f"No space left on device: {size}")

    monkeypatch.setattr(shared_memory.os, "posix_fallocate", full)
    with ThreadPoolExecutor(2) as pool:
        port = free_port()
        receiver = pool.submit(join, port, 1, 2)
        with pytest.raises(SyncError, match=r"not formed .*No space left on device: 28672"):
            join(port, 0, 2)
        with pytest.raises(SyncError):
            receiver.result()
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if "real_openrlhf_sync" in str(path)]


STRANGER = """
import os, time
kept = [os.memfd_create("other") for _ in range(200)]
for fd in kept:
    os.ftruncate(fd, 1 << 20)
print("up", flush=True)
time.sleep(60)
"""


def test_another_process_s_memory_is_not_taken_for_rank_0_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process numbering the same path may exist and be something else."""
    with subprocess.Popen([sys.executable, "-c", STRANGER], stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline() == "up\n"
        monkeypatch.setattr(shared_memory.os, "getpid", lambda: stranger.pid)
        port = free_port()
        with ThreadPoolExecutor(2) as pool:
            sender = pool.submit(join, port, 0, 2)
            with pytest.raises(SyncError, match="is not the memory of rank 0"):
                join(port, 1, 2)
            with pytest.raises(SyncError):
                sender.result()
        monkeypatch.undo()
        stranger.kill()


CHILD = """
import sys, time, torch
from real_openrlhf.actors.sync.transfer import SyncGroup
group = SyncGroup.create("127.0.0.1", int(sys.argv[1]), int(sys.argv[2]), 2, "shared_memory", 5.0, buffer_bytes=8192)
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
def test_nothing_stays_behind_when_one_side_is_killed(dies: int) -> None:
    gc.collect()  # earlier tests' errors hold frames with tensors
    before, mapped, port = in_memory(), n_mapped(), free_port()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(port), str(dies)], stdout=subprocess.PIPE, text=True)
    try:
        group = SyncGroup.create("127.0.0.1", port, 1 - dies, 2, "shared_memory", 5.0, buffer_bytes=8192)
        buffer = group.buffer(2048, torch.float32)
        if dies == 1:
            buffer.fill_(3.0)
        group.broadcast(buffer)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        # What was sent before is whole; what comes after is an error, not a hang.
        assert bool((buffer == (7.0 if dies == 0 else 3.0)).all())
        with pytest.raises(SyncError):
            for _ in range(3):
                group.broadcast(group.buffer(2048, torch.float32))
        del buffer
        group.destroy()
    finally:
        child.kill()
        child.wait()
    assert not in_memory() - before
    gc.collect()
    assert n_mapped() <= mapped


def test_one_host_has_one_id() -> None:
    other = subprocess.run(
        [sys.executable, "-c", "from real_openrlhf.actors.sync.shared_memory import host_id; print(host_id())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == host_id()
