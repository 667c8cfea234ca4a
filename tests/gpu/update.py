"""The real policy actor on a GPU: it starts without a compiler, trains, and how does it add up its gradients?

The parent asks; each child (`python -m tests.gpu.update --child ...`) is one actor in a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.harness import DEVICE, ON_GPU, Report, run

# Qwen3-0.6B's shape; a step of one prompt and 16 rollouts.
SHAPE: dict[str, Any] = dict(hidden=1024, layers=28, vocabulary=151_936)
TINY: dict[str, Any] = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=512)
PROMPT, RESPONSE, SAMPLES = (1024, 256, 16) if ON_GPU else (24, 8, 4)
UPDATES = 4
RATE = 1e-5
BY = ("self_cpu_time_total", "self_device_time_total")


def child(folder: str, micro: int, accumulate: str, profile: bool) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from examples.benchmark.protocol import Case
    from examples.benchmark.rollouts import SCALE
    from real_openrlhf.actors.policy.policy_actor import RealPolicyActor
    from real_openrlhf.actors.policy.spec import PolicySpec
    from real_openrlhf.actors.sync.transfer import free_port
    from real_openrlhf.algo.loss import LossOptions
    from real_openrlhf.common.device import Device
    from real_openrlhf.config.convert import build_config
    from real_openrlhf.config.openrlhf_args import to_openrlhf_args
    from tests.gpu.small_models import train_group

    device = Device(name=DEVICE, dtype_name="bf16")
    config = build_config(
        {
            "actor.model_name_or_path": folder,
            "data.prompt_dataset": "none",
            "actor.adam.lr": RATE,
            "rollout.batch_size": 1,
            "rollout.n_samples_per_prompt": SAMPLES,
            "train.micro_batch_size": micro,
            "train.max_tokens_per_gpu": 2**20,
            "ds.grad_accum_dtype": accumulate,
        }
    )
    args = to_openrlhf_args(config, device_dtype="bf16", attn="sdpa", sync_backend=device.dist_backend)
    spec = PolicySpec(
        path=folder,
        args=args,
        device=device,
        attn_implementation="sdpa",
        ranks_per_node=1,
        values=SCALE.values,
        options=LossOptions(),
        trains_score_token=False,
        term_grad_norm_steps=0,
        norms_at_parameters=False,
        max_steps=10,
        bucket_bytes=2**28,
        logits_mb=None,
    )
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **device.trainer_env(1))
    start = time.perf_counter()
    actor = RealPolicyActor(1, 0, "127.0.0.1", free_port())
    facts = actor.build(spec)
    found: dict[str, Any] = {"build seconds": time.perf_counter() - start, "packed gap": facts["packed_gap"]}
    vocabulary = actor.actor.model.module.config.vocab_size
    probes = [list(range(9, 9 + n)) for n in (60, 37)]
    before = torch.cat(actor.token_logprobs(probes))
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device.current())
    wanted = []
    for ids in probes:
        row = torch.tensor([ids], device=device.current())
        with torch.no_grad():
            table = exact(row).logits[0, :-1].log_softmax(-1)
        wanted.append(table.gather(-1, row[0, 1:, None])[:, 0].cpu())
    del exact
    gap = (torch.cat(wanted) - before).abs()
    found["log-probs: gap to fp32, mean and max"] = [float(gap.mean()), float(gap.max())]
    found["log-probs: spread"] = float(before.std())
    case = Case(prompt=PROMPT, response=RESPONSE, samples=SAMPLES, micro_batch=SAMPLES)
    seconds, norms = [], []
    for update in range(UPDATES):
        group = train_group(case, vocabulary=vocabulary, seed=update)
        device.synchronize()
        start = time.perf_counter()
        metrics = actor.train([group])
        device.synchronize()
        seconds.append(time.perf_counter() - start)
        norms.append(metrics["policy/grad_norm"])
    found["seconds of updates"] = seconds
    found["gradient norms"] = norms
    found["peak GiB"] = device.memory_stats()["peak_bytes"] / 2**30
    found["log-probs moved by, mean"] = float((torch.cat(actor.token_logprobs(probes)) - before).abs().mean())
    if profile and ON_GPU:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiled

        with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            actor.train([train_group(case, vocabulary=vocabulary, seed=99)])
            torch.cuda.synchronize()
        averages = prof.key_averages()
        folder_of_tables = Path(os.environ.get("OUT") or "runs/gpu")
        tables = [averages.table(sort_by=by, row_limit=45, max_name_column_width=70) for by in BY]
        (folder_of_tables / "profile_update.txt").write_text("\n\n".join(tables), encoding="utf-8")
        events = {e.key: e.count for e in averages}
        names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel", "aten::item")
        found["calls in one update"] = {name: events.get(name, 0) for name in names}
    return found


def without_a_compiler() -> dict[str, str]:
    """The environment with no nvcc on the PATH, and a place where nothing was ever compiled."""
    # A folder that holds other tools too stays; Triton, for one, compiles its launchers with gcc.
    folders = [
        p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists() or (Path(p) / "gcc").exists()
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    return {**env, "PATH": os.pathsep.join(folders), "TORCH_EXTENSIONS_DIR": tempfile.mkdtemp()}


def check(report: Report) -> None:
    from tests.gpu.small_models import random_model

    with tempfile.TemporaryDirectory() as folder:
        random_model(**(SHAPE if ON_GPU else TINY)).to(torch.bfloat16).save_pretrained(folder)
        if ON_GPU:
            torch.cuda.empty_cache()
        found: dict[str, dict[str, Any]] = {}
        env = without_a_compiler()
        for name, micro, accumulate, profile in (
            ("one micro-batch", SAMPLES, "fp32", True),
            ("micro-batches of 1, fp32", 1, "fp32", False),
        ):
            command = [sys.executable, "-m", "tests.gpu.update", "--child", folder, str(micro), accumulate]
            command += ["profile"] if profile else []
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
            if done.returncode:
                raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            for key, value in found[name].items():
                report.figure(f"{name}: {key}", value)
        compiled = any(Path(env["TORCH_EXTENSIONS_DIR"]).iterdir())
    report.figure("something was compiled", compiled)
    report.expect(not compiled, "an extension was compiled at start")
    whole = found["one micro-batch"]
    report.expect(whole["log-probs moved by, mean"] > 0, "the weights did not move")
    mean, spread = whole["log-probs: gap to fp32, mean and max"][0], whole["log-probs: spread"]
    report.expect(mean < 0.2 < spread, "log-probs are too far from fp32's, or too alike for the check to mean anything")
    # Only the first update starts from equal weights.
    for name in ("micro-batches of 1, fp32",):
        first = abs(found[name]["gradient norms"][0] / whole["gradient norms"][0] - 1)
        report.figure(f"{name}: first gradient norm differs from one micro-batch by, relative", first)
    report.expect(
        report.figures["micro-batches of 1, fp32: first gradient norm differs from one micro-batch by, relative"]
        < 0.02,
        "gradients of micro-batches do not add up to those of one",
    )


if __name__ == "__main__":
    if "--child" in sys.argv:
        folder, micro, accumulate, *more = sys.argv[sys.argv.index("--child") + 1 :]
        print(json.dumps(child(folder, int(micro), accumulate, bool(more))))
    else:
        run("update", "Does the policy actor start without nvcc and train, and do gradients add up?", check)
