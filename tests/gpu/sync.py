"""Weight sync inside a GPU: does every bit arrive in another process by CUDA IPC, and how long do the weights take?

Two processes on one GPU stand for a policy rank and an engine worker: no vLLM, no Ray. The second one's `load_weights`
is a copy into its own parameters. On a CPU an anonymous file stands for the GPU's memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.actors.sync.cuda_ipc import CudaIpc
from real_openrlhf.actors.sync.transfer import (
    Bucket,
    SyncGroup,
    free_port,
    from_wire,
    make_plan,
    receive_buckets,
    send_bucket,
    to_wire,
)
from tests.gpu.harness import DEVICE, ON_GPU, Report, run
from tests.helpers.memfd_memory import MemfdMemory

DEADLINE_S = 40.0  # the other process imports torch and asks for its memory first
LIMIT_S = 4.0  # for the 8B model by ipc
BUCKET_BYTES = 2**28 if ON_GPU else 2**16
# Width, layers, width of the MLP, heads, heads of keys and values, tokens, whether the head is the embedding.
MODELS = {
    "1.7B": (2048, 28, 6144, 16, 8, 151_936, True),
    "8B": (4096, 36, 12_288, 32, 8, 151_936, False),
}
if not ON_GPU:
    MODELS = {
        name: (w // 32, n // 7, m // 32, h // 8, kv // 8, v // 64, t) for name, (w, n, m, h, kv, v, t) in MODELS.items()
    }
HEAD_SIZE = 128 if ON_GPU else 8


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Qwen3's parameters, in the checkpoint's order."""
    width, layers, mlp, heads, kv_heads, tokens, tied = MODELS[model]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (heads * HEAD_SIZE, width),
            "self_attn.k_proj": (kv_heads * HEAD_SIZE, width),
            "self_attn.v_proj": (kv_heads * HEAD_SIZE, width),
            "self_attn.o_proj": (width, heads * HEAD_SIZE),
            "self_attn.q_norm": (HEAD_SIZE,),
            "self_attn.k_norm": (HEAD_SIZE,),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (width,)
    return found if tied else found | {"lm_head.weight": (tokens, width)}


def join(backend: str, port: int, rank: int, buffer_bytes: int) -> SyncGroup:
    if backend == "ipc" and not ON_GPU:
        memory = MemfdMemory("none")
        transport = CudaIpc("127.0.0.1", port, rank, 2, DEADLINE_S, buffer_bytes, 1, memory)
        return SyncGroup(transport, rank, 2, torch.device("cpu"))
    return SyncGroup.create("127.0.0.1", port, rank, 2, backend, DEADLINE_S, buffer_bytes=buffer_bytes)


def bits(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Exact sums by parameter: of all its bits as integers, and of every third row's, which notices a wrong order."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.view(torch.int16).flatten()
        found[name] = [int(part.sum(dtype=torch.int64)) for part in (flat, flat[::3], flat[: len(flat) // 2])]
    return found


def settle() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def receiver() -> None:
    """The other process. It answers on stdout: "loaded" when a sync is through, then the sums of what it holds."""
    job = json.loads(sys.stdin.readline())
    plan = from_wire(job["plan"])
    parameters = {p.name: torch.zeros(p.shape, dtype=b.dtype, device=DEVICE) for b in plan for p in b.parameters}
    group = join(job["backend"], job["port"], 1, 0)
    for _ in range(job["rounds"]):
        for _, weights in receive_buckets(group, plan):
            for name, view in weights:
                parameters[name].copy_(view)
        group.flush()
        settle()
        print("loaded", flush=True)
        print(json.dumps(bits(parameters)), flush=True)
    group.destroy()


@contextmanager
def other_process(job: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.gpu.sync", "receiver"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdin is not None
        print(json.dumps(job), file=child.stdin, flush=True)
        yield child
        child.wait(timeout=DEADLINE_S)
    finally:
        child.kill()
        child.wait()


def answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"the receiving process ended with {child.wait()}; its error stands above")
    return line.strip()


def sync(plan: list[Bucket], tensors: dict[str, Tensor], backend: str, rounds: int) -> tuple[list[float], bool]:
    """(seconds of each sync, whether every sum was the sender's every time)."""
    port, largest = free_port(), max(bucket.nbytes for bucket in plan)
    seconds, exact = [], True
    with other_process({"plan": to_wire(plan), "backend": backend, "port": port, "rounds": rounds}) as child:
        group = join(backend, port, 0, largest)
        for version in range(rounds):
            for tensor in tensors.values():
                tensor.view(torch.int16).bitwise_xor_(version + 1)  # another version of the weights
            wanted = bits(tensors)
            settle()
            start = time.perf_counter()
            for bucket in plan:
                send_bucket(group, bucket, [tensors[p.name] for p in bucket.parameters])
            group.flush()
            if answer(child) != "loaded":
                raise RuntimeError("the receiving process answered something else")
            seconds.append(time.perf_counter() - start)
            exact = exact and json.loads(answer(child)) == wanted
        group.destroy()
    return seconds, exact


def check(report: Report) -> None:
    for model, backends in (("1.7B", ("ipc", "gloo")), ("8B", ("ipc",))):
        wanted = shapes(model)
        plan = make_plan([(name, shape, "bfloat16") for name, shape in wanted.items()], BUCKET_BYTES)
        size = sum(bucket.nbytes for bucket in plan)
        if ON_GPU and torch.cuda.mem_get_info()[0] < 2 * size + 4 * max(b.nbytes for b in plan) + 2**31:
            report.figure(f"{model} skipped, GiB of free memory", torch.cuda.mem_get_info()[0] / 2**30)
            continue
        torch.manual_seed(0)
        bounds = torch.iinfo(torch.int16)
        tensors = {
            name: torch.randint(bounds.min, bounds.max, shape, dtype=torch.int16, device=DEVICE).view(torch.bfloat16)
            for name, shape in wanted.items()
        }
        for backend in backends:
            # The first sync maps memory and warms up; a run does it once.
            seconds, exact = sync(plan, tensors, backend, 2 if backend == "gloo" else 4)
            usual = statistics.median(seconds[1:])
            report.figure(f"{model} {backend} s", usual)
            report.figure(f"{model} {backend} first s", seconds[0])
            report.figure(f"{model} {backend} GB/s", size / 1e9 / usual)
            report.expect(exact, f"{model} by {backend}: other bits arrived than were sent; use --sync.backend gloo")
            if (model, backend) == ("8B", "ipc"):
                report.expect(usual <= LIMIT_S, f"8B by ipc took {usual:.1f} s, {LIMIT_S:g} s were expected")
        report.figure(f"{model} buckets", len(plan))
        tensors.clear()
        if ON_GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if sys.argv[1:] == ["receiver"]:
        receiver()
    else:
        run("sync", "Do weights arrive by CUDA IPC, bit for bit, and how fast?", check)
