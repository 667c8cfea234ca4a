"""The output layer: are chunks in bf16 with fp32 sums right, and what do they cost?"""

from __future__ import annotations

import torch
from torch import Tensor

from real_openrlhf.actors.policy.logprob_head import LogprobHead, Request
from real_openrlhf.algo.packing import layout_of
from tests.gpu.harness import DEVICE, ON_GPU, Report, milliseconds, peak_gib, relative_error, run

VOCABULARY, WIDTH, ROWS = (151_936, 2048, 8192) if ON_GPU else (512, 64, 64)
CHECKED = 512


def make(rows: int, dtype: torch.dtype) -> tuple[LogprobHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = LogprobHead(WIDTH, VOCABULARY, bias=False, device=DEVICE, dtype=dtype)
    hidden = torch.randn(rows, WIDTH, device=DEVICE, dtype=dtype) * 2
    tokens = torch.randint(0, VOCABULARY, (rows,), device=DEVICE)
    return head, hidden.requires_grad_(), tokens


def request(tokens: Tensor, megabytes: int) -> Request:
    rows = torch.arange(len(tokens), device=DEVICE)
    return Request(
        layout=layout_of([(1, (1,))]),
        logit_index=rows,
        row=rows,
        token=tokens,
        temperature=1.0,
        max_bytes=megabytes * 2**20,
    )


def right(report: Report) -> None:
    head, hidden, tokens = make(CHECKED, torch.bfloat16)
    with torch.no_grad():
        # Sure of some tokens, as a trained model is.
        head.weight.mul_(3)
    picks, entropy, _ = head(hidden, request(tokens, 8))
    weights = torch.randn_like(picks)
    mine = [picks, entropy, *torch.autograd.grad(picks @ weights, (hidden, head.weight))]
    exact, inner = head.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    table = (inner @ exact.T).log_softmax(-1)
    wanted = table.gather(1, tokens[:, None])[:, 0]
    theirs = [wanted, -(table.exp() * table).sum(-1)]
    theirs += torch.autograd.grad(wanted @ weights.double(), (inner, exact))
    largest = float((picks - wanted).abs().max().detach())
    report.figure("largest error of a log-prob", largest)
    report.expect(largest < 1e-3, "log-probs are not those of fp32 logits")
    for name, a, b in zip(("log-probs", "entropy", "grad hidden", "grad weight"), mine, theirs, strict=True):
        error = relative_error(a.detach(), b.detach())
        report.figure(f"relative error, {name}", error)
        report.expect(error < 5e-3, f"{name} is off")


def costs(report: Report) -> None:
    head, hidden, tokens = make(ROWS, torch.bfloat16)
    flops = 6 * ROWS * WIDTH * VOCABULARY

    def step(megabytes: int) -> None:
        picks = head(hidden, request(tokens, megabytes))[0]
        torch.autograd.grad(picks.sum(), (hidden, head.weight))

    def whole() -> None:
        table = torch.nn.functional.linear(hidden, head.weight).float().log_softmax(-1)
        torch.autograd.grad(table.gather(1, tokens[:, None]).sum(), (hidden, head.weight))

    ways = {f"{mb} MB": (lambda mb=mb: step(mb)) for mb in (1024, 4096, 16384)}
    for name, way in {**ways, "whole logits": whole}.items():
        ms = milliseconds(way, repeats=5, warm_up=2)
        report.figure(f"{ROWS} rows, {name}: ms, needed TFLOP/s, peak GiB", [ms, flops / ms / 1e9, peak_gib(way)])


def check(report: Report) -> None:
    right(report)
    costs(report)


if __name__ == "__main__":
    run("head", "Are log-probs and gradients of the output layer right in bf16, and what do its chunks cost?", check)
