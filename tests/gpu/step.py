"""Forward and backward of one packed row at Qwen3-1.7B's shape: how much of the card's matrix rate does it reach?

The profile says where the time goes. Optimizer and DeepSpeed are left out; `examples.benchmark.gpu` measures whole
steps.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.benchmark.flops import Shape, needed
from examples.benchmark.protocol import Case
from examples.benchmark.rollouts import SCALE
from real_openrlhf.actors.policy.model import outputs_of
from real_openrlhf.actors.policy.trainer import loss_inputs
from real_openrlhf.algo.batch import collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from tests.gpu.harness import DEVICE, ON_GPU, Report, milliseconds, peak_gib, run
from tests.gpu.small_models import random_model, train_group

SIZES: dict[str, int] = dict(hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, vocabulary=151_936)
TINY: dict[str, int] = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=512)
CASE = Case(prompt=2048, response=512, samples=16, micro_batch=16)
SMALL = Case(prompt=24, response=8, samples=4, micro_batch=4)
LOGITS_MB = 8192  # about a tenth of an 80 GB card, see Device.logits_mb


def matrix_rate(rows: int, inputs: int, outputs: int) -> float:
    """TFLOP/s of a bf16 product."""
    a, b = (torch.randn(*s, device=DEVICE, dtype=torch.bfloat16) for s in ((rows, inputs), (inputs, outputs)))
    return 2 * rows * inputs * outputs / milliseconds(lambda: a @ b, repeats=20) / 1e9


def stepper(model: Any, case: Case, vocabulary: int) -> Callable[[], None]:
    rows = rows_of([train_group(case, vocabulary=vocabulary)])
    batch, counts = collate(rows).to(DEVICE), denominators_of(rows, trains_score_token=False)

    def step() -> None:
        outputs = outputs_of(model, batch, temperature=1.0, max_bytes=LOGITS_MB * 2**20)
        inputs = loss_inputs(batch, outputs.token_logprobs, outputs.label_logprobs, SCALE.tensor(), outputs.entropy)
        policy_loss(inputs, options=LossOptions(), denominators=counts).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def profile(step: Callable[[], None], name: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    averages = prof.key_averages()
    by_time = averages.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)
    folder = Path(os.environ.get("OUT") or "runs/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"profile_{name}.txt").write_text(by_time, encoding="utf-8")
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels)
    print(f"  kernels of {name}: {total / 1e3:.1f} ms in all")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:18]:
        print(f"    {e.self_device_time_total / 1e3:8.2f} ms {e.count:6d} x  {e.key[:110]}")
    syncs = {e.key: e.count for e in averages if "ynchronize" in e.key or e.key in ("aten::item", "aten::nonzero")}
    print(f"  synchronisations: {syncs}")


def liger(model: Any) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3(
        model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def measure(
    report: Report, name: str, sizes: dict[str, int], case: Case, *, checkpointing: bool, kernels: bool
) -> None:
    model = random_model(**sizes).to(torch.bfloat16)
    model.train()
    if kernels:
        liger(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = stepper(model, case, sizes["vocabulary"])
    ms = milliseconds(step, repeats=3, warm_up=2)
    shape = Shape(
        vocabulary=sizes["vocabulary"],
        hidden=sizes["hidden"],
        intermediate=3 * sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
    )
    rate = needed(shape, case) / ms / 1e9
    report.figure(f"{name}: ms", ms)
    report.figure(f"{name}: needed TFLOP/s", rate)
    report.figure(f"{name}: MFU, of the best matrix rate", rate / report.figures["matrix rate, TFLOP/s"])
    report.figure(f"{name}: peak GiB above weights", peak_gib(step))
    if ON_GPU and not checkpointing:
        profile(step, name.replace(" ", "_").replace(",", ""))
    del model, step
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def check(report: Report) -> None:
    n = 8192 if ON_GPU else 256
    report.figure("matrix rate, TFLOP/s", max(matrix_rate(n, n, n), matrix_rate(n, n // 4, 3 * n // 4)))
    sizes, case = (SIZES, CASE) if ON_GPU else (TINY, SMALL)
    measure(report, "1.7b", sizes, case, checkpointing=False, kernels=False)
    try:
        measure(report, "1.7b with liger", sizes, case, checkpointing=False, kernels=True)
    except Exception as error:  # an optional package, whose failure is an answer too
        report.figure("1.7b with liger", f"{type(error).__name__}: {error}")
    measure(report, "1.7b, checkpointing", sizes, case, checkpointing=True, kernels=False)
    # Runs take Liger's layers where they can be had.
    share = report.figures.get("1.7b with liger: MFU, of the best matrix rate")
    share = share or report.figures["1.7b: MFU, of the best matrix rate"]
    report.expect(share >= 0.4, "below the aim of 40%; install liger-kernel if it is not there, else see the profile")


if __name__ == "__main__":
    run("step", "What share of the card's matrix rate does a packed forward and backward reach?", check)
