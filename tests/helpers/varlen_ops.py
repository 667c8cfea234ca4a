"""`VarlenOps` in plain torch, segment by segment, on any device and in any precision."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from real_openrlhf.actors.policy.varlen_attention import Segments


class PlainOps:
    """calls: one (causal, segments, window) per call, in order; backward calls not among them."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, Segments, int | None]] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        self.calls.append((causal, segments, window))
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=_wide(q), device=q.device)
        for mine, theirs in _spans(segments):
            scores = _scores(q[mine], k[theirs], scale, causal, window)
            lse[:, mine] = scores.logsumexp(-1)
            out[mine] = _mix(scores.softmax(-1), v[theirs], q.shape[1]).to(q.dtype)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        *,
        causal: bool,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # As the kernels read them: a strided lse would be read wrongly.
        assert lse.is_contiguous() and all(x.stride(-1) == 1 for x in (grad, q, k, v, out))
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        wide, times = _wide(q), q.shape[1] // k.shape[1]
        for mine, theirs in _spans(segments):
            probs = (_scores(q[mine], k[theirs], scale, causal, window) - lse[:, mine, None]).exp()
            g, o = grad[mine].to(wide), out[mine].to(wide)
            keys, values = (x[theirs].to(wide).repeat_interleave(times, dim=1) for x in (k, v))
            delta = (g * o).sum(-1).T[..., None]
            ds = probs * (torch.einsum("qhd,khd->hqk", g, values) - delta) * scale
            dq[mine] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
            of_keys = torch.einsum("hqk,qhd->khd", ds, q[mine].to(wide))
            of_values = torch.einsum("hqk,qhd->khd", probs, g)
            for total, part in ((dk, of_keys), (dv, of_values)):
                total[theirs] = part.unflatten(1, (-1, times)).sum(2).to(k.dtype)
        return dq, dk, dv


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spans(segments: Segments) -> list[tuple[slice, slice]]:
    """(queries, keys) of each segment; the two totals must be those of the tensors."""
    q, k = (list(pairwise(ends.tolist())) for ends in (segments.queries, segments.keys))
    assert segments.longest_query == max(b - a for a, b in q)
    assert segments.longest_key == max(b - a for a, b in k)
    return [(slice(*a), slice(*b)) for a, b in zip(q, k)]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """[H, queries, keys]"""
    k = k.to(_wide(q)).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(k.dtype), k) * scale
    if not causal:
        return scores
    row = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    column = torch.arange(len(k), device=q.device)
    seen = column <= row
    if window is not None:
        seen &= column >= row - window
    return scores.masked_fill(~seen, float("-inf"))


def _mix(probs: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.einsum("hqk,khd->qhd", probs, v.to(probs.dtype).repeat_interleave(heads // v.shape[1], dim=1))
