"""Two gloo ranks under DDP give the gradients of one process, however unevenly the rows are dealt out."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from real_openrlhf.algo.batch import Row, collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import Denominators
from tests.helpers.algo_factory import TinyPolicy, grad_of, inputs_of, random_groups

SCALE = ScoreScale.parse("1-3")
RANKS = 2
OPTIONS = [
    LossOptions(kl_coef=0.1, entropy_coef=0.01),
    LossOptions(aggregation="token_mean", ratio="clip", kl_coef=0.1, entropy_coef=0.01),
    LossOptions(aggregation="token_mean", tis_cap=1.5),
]
# Rows per rank; the last share is accumulated over two micro-batches by each rank.
SHARES = [[3, 9], [11, 1], [8, 4]]


def all_rows() -> list[Row]:
    return rows_of(random_groups(11, 3, 4, SCALE))


def step(rank: int, options: LossOptions, sizes: list[int], accumulation: int) -> list[torch.Tensor]:
    start = sum(sizes[:rank])
    rows = all_rows()[start : start + sizes[rank]]
    own = denominators_of(rows, trains_score_token=True)
    counts = torch.tensor([own.rollouts, own.action_tokens, own.response_tokens], dtype=torch.float64)
    dist.all_reduce(counts)
    total = Denominators(rollouts=float(counts[0]), action_tokens=float(counts[1]), response_tokens=float(counts[2]))
    model = DistributedDataParallel(TinyPolicy())
    per_batch = -(-len(rows) // accumulation)
    for i in range(accumulation):
        inputs = inputs_of(model, collate(rows[i * per_batch : (i + 1) * per_batch]), SCALE.tensor())
        # As under DeepSpeed: losses are averaged over ranks and over the accumulated micro-batches.
        out = policy_loss(inputs, options=options, denominators=total, loss_scale=RANKS * accumulation)
        (out.loss / accumulation).backward()
    return [grad_of(p) for p in model.parameters()]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    results = [
        step(rank, options, sizes, accumulation)
        for options in OPTIONS
        for sizes, accumulation in zip(SHARES, (1, 1, 2))
    ]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    rows = all_rows()
    expected = []
    for options in OPTIONS:
        policy = TinyPolicy()
        inputs = inputs_of(policy, collate(rows), SCALE.tensor())
        counts = denominators_of(rows, trains_score_token=True)
        policy_loss(inputs, options=options, denominators=counts).loss.backward()
        expected += [[grad_of(p) for p in policy.parameters()]] * len(SHARES)
    for grads in ranks:
        assert len(grads) == len(expected) == len(OPTIONS) * len(SHARES)
        for got, want in zip(grads, expected):
            assert all(w.abs().max() > 0.01 for w in want)
            for g, w in zip(got, want):
                assert torch.allclose(g, w, atol=1e-12)
