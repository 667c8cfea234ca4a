"""The packed step in bf16: is it as close to fp32 maths as separate rows in bf16 are?"""

from __future__ import annotations

import statistics

import torch

from examples.benchmark.protocol import Case
from real_openrlhf.actors.policy.model import CHECKED_PROMPT, CHECKED_RESPONSES, PolicyModel
from real_openrlhf.common.device import Device
from tests.gpu.harness import DEVICE, ON_GPU, Report, relative_error, run
from tests.gpu.small_models import gradient, in_dtype, packed_step, random_model, separate_step, train_group

CASE = Case(prompt=512, response=128, samples=8, micro_batch=8)
SMALL = Case(prompt=24, response=8, samples=4, micro_batch=4)


def step(report: Report) -> None:
    sizes = {} if ON_GPU else dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16)
    exact = random_model(**sizes)
    narrow = in_dtype(exact, torch.bfloat16)
    exact = in_dtype(narrow, torch.float32)  # the same weights, those that bf16 can hold
    group = train_group(CASE if ON_GPU else SMALL, vocabulary=8192)
    found = {}
    for name, model, way in (
        ("fp32, separate rows", exact, lambda m: separate_step(m, group)),
        ("fp32, packed", exact, lambda m: packed_step(m, group)[:2]),
        ("bf16, separate rows", narrow, lambda m: separate_step(m, group)),
        ("bf16, packed", narrow, lambda m: packed_step(m, group)[:2]),
    ):
        logprobs, loss = way(model)
        found[name] = logprobs, loss, gradient(model)
    wanted = found["fp32, separate rows"]
    report.figure("spread of log-probs", float(wanted[0].std()))
    for name, (logprobs, loss, grad) in found.items():
        gap = (logprobs - wanted[0]).abs()
        report.figure(f"{name}: log-prob gap to fp32, mean and max", [float(gap.mean()), float(gap.max())])
        report.figure(f"{name}: loss", loss)
        report.figure(f"{name}: relative error of the gradient", relative_error(grad, wanted[2]))
    report.expect(report.figures["fp32, packed: relative error of the gradient"] < 1e-3, "the fp32 path differs")
    ours, theirs = (report.figures[f"bf16, {w}: relative error of the gradient"] for w in ("packed", "separate rows"))
    report.expect(ours < 1.5 * theirs + 1e-6, "the packed gradient in bf16 is worse than that of separate rows")
    ours, theirs = (
        report.figures[f"bf16, {w}: log-prob gap to fp32, mean and max"][0] for w in ("packed", "separate rows")
    )
    report.expect(ours < 1.5 * theirs + 1e-6, "packed log-probs in bf16 are worse than those of separate rows")


def check_at_start(report: Report) -> None:
    """`PolicyModel.check_packed_rows` on 20 random texts: does it let honest bf16 pass?"""
    device = Device(name=DEVICE, dtype_name="bf16")
    network = random_model(**({} if ON_GPU else dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16)))
    model = PolicyModel.__new__(PolicyModel)
    torch.nn.Module.__init__(model)
    model.model, model.device, model.temperature = network.to(torch.bfloat16), device, 1.0
    model.max_logit_bytes, model.vocabulary, model.model_type = 2**28, 8192, "qwen3"
    gaps = []
    for seed in range(20):
        torch.manual_seed(seed)
        text = torch.randint(0, 8192, (CHECKED_PROMPT + sum(CHECKED_RESPONSES),)).tolist()
        gaps.append(model.check_packed_rows(text))
    report.figure("gap of the check at start over 20 seeds: median and largest", [statistics.median(gaps), max(gaps)])
    report.figure("its limit", device.sync_tolerance)


def check(report: Report) -> None:
    step(report)
    check_at_start(report)


if __name__ == "__main__":
    run("packed", "Is the packed step in bf16 as close to fp32 maths as separate rows are?", check)
