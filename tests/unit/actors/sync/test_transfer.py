from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from real_openrlhf.actors.sync.transfer import (
    SyncError,
    SyncGroup,
    free_port,
    from_wire,
    make_plan,
    receive_bucket,
    send_bucket,
    to_wire,
)


def test_plan_cuts_by_bytes_and_dtype():
    named = [
        ("a", (10,), "float32"),  # 40 bytes
        ("b", (2, 5), "float32"),  # 40: fills the bucket of 80
        ("c", (1,), "float32"),
        ("d", (1,), "bfloat16"),  # another dtype
        ("e", (100,), "bfloat16"),  # larger than a bucket
        ("f", (40,), "bfloat16"),  # 80 bytes exactly
        ("g", (), "bfloat16"),
    ]
    plan = make_plan(named, bucket_bytes=80)
    assert [[p.name for p in bucket.parameters] for bucket in plan] == [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"]]
    assert [bucket.numel for bucket in plan] == [20, 1, 1, 100, 40, 1]
    assert plan[3].dtype == torch.bfloat16
    assert from_wire(json.loads(json.dumps(to_wire(plan)))) == plan
    assert make_plan([], bucket_bytes=1) == []


@pytest.mark.parametrize(
    ("named", "size", "says"),
    [
        ([("a", (1,), "int8")], 8, "'a' has dtype 'int8'"),
        ([("a", (1,), "float32"), ("a", (1,), "float32")], 8, "'a' appears twice"),
        ([("a", (1,), "float32")], 0, "bucket_bytes"),
    ],
)
def test_bad_plans(named, size, says):
    with pytest.raises(ValueError, match=says):
        make_plan(named, size)


@pytest.fixture
def pair():
    """Two ranks of one gloo group, in two threads, with a deadline of one second."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        make = [pool.submit(SyncGroup.create, "127.0.0.1", port, rank, 2, "gloo", 1.0) for rank in (0, 1)]
        groups = [future.result() for future in make]
        yield groups, pool
    for group in groups:
        group.destroy()


def test_tensors_arrive_as_sent(pair):
    (sender, receiver), pool = pair
    tensors = {"w": torch.randn(3, 4).t(), "b": torch.randn(5, dtype=torch.float64), "s": torch.tensor(2.5)}
    plan = make_plan([(n, t.shape, "bfloat16" if n == "b" else "float32") for n, t in tensors.items()], 1000)

    def receive():
        return [pair for bucket in plan for pair in receive_bucket(receiver, bucket)]

    future = pool.submit(receive)
    for bucket in plan:
        send_bucket(sender, bucket, [tensors[p.name] for p in bucket.parameters])
    got = dict(future.result())
    assert list(got) == ["w", "b", "s"]
    assert torch.equal(got["w"], tensors["w"]) and torch.equal(got["s"], tensors["s"])
    assert torch.equal(got["b"], tensors["b"].to(torch.bfloat16))


def test_a_silent_sender_meets_the_deadline(pair):
    (_, receiver), _ = pair
    plan = make_plan([("first", (4,), "float32"), ("last", (4,), "float32")], 1000)
    with pytest.raises(SyncError, match=r"weights first \.\. last"):
        receive_bucket(receiver, plan[0])


def test_sender_checks_its_tensors(pair):
    (sender, _), _ = pair
    (bucket,) = make_plan([("w", (2, 3), "float32")], 1000)
    with pytest.raises(ValueError, match=r"w has shape \(3, 2\)"):
        send_bucket(sender, bucket, [torch.zeros(3, 2)])
    with pytest.raises(ValueError, match="1 parameters, 0 tensors"):
        send_bucket(sender, bucket, [])


def test_a_group_that_is_not_complete():
    with pytest.raises(SyncError, match=r"127\.0\.0\.1:\d+, rank 1, .*not formed within 0\.5 s"):
        SyncGroup.create("127.0.0.1", free_port(), 1, 2, "gloo", 0.5)
    with pytest.raises(ValueError, match="rank 2"):
        SyncGroup.create("127.0.0.1", free_port(), 2, 2, "gloo", 0.5)
    with pytest.raises(ValueError, match="backend"):
        SyncGroup.create("127.0.0.1", free_port(), 0, 2, "mpi", 0.5)


def test_imports_nothing_heavy():
    """Both sides of a sync and the driver import these modules; vLLM's workers do so before they load the model."""
    names = ("actors.sync.transfer", "common.device", "actors.engine.spec")
    code = "".join(f"import real_openrlhf.{name}\n" for name in names)
    code += (
        "import sys; print([m for m in ('vllm', 'ray', 'openrlhf', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
