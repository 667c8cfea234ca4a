"""Checks that a sync reached the engines: their log-probs of the same text must equal the policy's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from real_openrlhf.common.errors import RunError


class StaleWeights(RunError):
    """An engine does not compute with the policy's weights."""


@dataclass
class Timed:
    seconds: float = 0.0


@contextmanager
def timed() -> Iterator[Timed]:
    result, start = Timed(), time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - start


def sync_ranks(widths: Sequence[int]) -> tuple[list[int], int]:
    """(rank of each engine's first worker, size of the group). Rank 0 is the policy's; widths: workers per engine."""
    offsets, world = [], 1
    for width in widths:
        offsets.append(world)
        world += width
    return offsets, world


def check_agreement(
    policy: Sequence[Tensor], engines: Sequence[Sequence[Tensor]], version: int, max_mean_difference: float
) -> tuple[float, float, int]:
    """How much the log-probs of engines and policy differ: (mean, largest, tokens).

    mean: the mean absolute difference of the worst engine. largest: that of any token of any engine. tokens: their
    number over all engines. Arguments: policy has one [L - 1] tensor per probe, engines the same for each engine.
    Checksums of parameters would prove nothing, since an engine may compute with a packed copy of a weight.
    Raises StaleWeights when an engine's mean exceeds max_mean_difference or is not a number.
    """
    means, largest, n_tokens = [], 0.0, 0
    mine = torch.cat([p.double() for p in policy])
    if not mine.numel():
        raise StaleWeights("the probes hold no log-prob: --sync.check_tokens must be at least 2, prompts too")
    if not mine.isfinite().all():
        raise StaleWeights(
            f"after weight sync {version}, the policy's own log-probs are NaN or infinite: its weights are, or they "
            "are too large to compute with. Lower --actor.adam.lr, or raise --actor.lr_warmup_ratio, and resume from a "
            "checkpoint before that (--ckpt.load best, or a path): the latest may have such weights too."
        )
    for index, theirs in enumerate(engines):
        lengths, wanted = [t.numel() for t in theirs], [p.numel() for p in policy]
        if lengths != wanted:
            raise StaleWeights(f"engine {index} returned {lengths} log-probs for probes of {wanted} tokens")
        other = torch.cat([t.double() for t in theirs])
        difference = (mine - other).abs()
        mean = float(difference.mean())
        # not (a <= b): a NaN must fail too.
        if not mean <= max_mean_difference:
            raise StaleWeights(
                f"after weight sync {version}, log-probs of engine {index} differ from the policy's by {mean:.2e} per "
                f"token on average and {float(difference.max()):.2e} at most, over {mine.numel()} tokens; allowed is a "
                f"mean of {max_mean_difference:.2e} (--sync.max_mean_difference). The engine does not compute with the "
                "weights that were sent, or it computes with another precision or attention."
            )
        means.append(mean)
        largest = max(largest, float(difference.max()))
        n_tokens += mine.numel()
    return max(means), largest, n_tokens


def mean_change(before: Sequence[Tensor] | None, now: Sequence[Tensor]) -> float | None:
    """Mean absolute difference of log-probs of the same text at two times; None without the first."""
    if before is None:
        return None
    return float((torch.cat([t.double() for t in before]) - torch.cat([t.double() for t in now])).abs().mean())
