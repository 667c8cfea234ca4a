"""Attention over a packed row by FlashAttention's varlen kernels: no padding, no copies of the prompt's keys.

There are two calls per layer, whatever the number of groups. "near" is causal, and each prompt and each rollout is a
segment. "far" is not causal: the rollouts of a group are one segment of queries, and the keys are those of their
prompt. The two softmaxes are merged by their log-sum-exps. In the backward pass each call gets the merged output and
the merged log-sum-exp, so that its probabilities are those of the softmax over all keys, and the gradients add up.

torch's own kernels are used (FlashAttention 2, or 3 after `torch.nn.attention.activate_flash_attention_impl`): bf16 and
fp16, grouped-query attention, head sizes up to 256 in steps of 8, from sm_80 on. `VarlenOps` says what they must do;
tests replace them by plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from real_openrlhf.algo.packing import PromptLayout

LARGEST_HEAD = 256
HEAD_STEP = 8


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where segments of queries and keys end: cumulative lengths [S + 1] int32, and the length of the longest."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, queries: list[int], keys: list[int], device: torch.device) -> Segments:
        """From the number of queries and of keys in each segment."""
        ends = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32).to(device)
        return cls(queries=ends[0], keys=ends[1], longest_query=max(queries), longest_key=max(keys))


class VarlenOps(Protocol):
    """Attention of T_q queries to T_k keys, segment by segment.

    query [T_q, H, D], key and value [T_k, H_kv, D]; causal aligns the ends of queries and keys; window: a query sees
    itself and that many keys before it, None: all of them. lse, the log-sum-exps: [H, T_q] in fp32, natural logarithm.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """(output [T_q, H, D], lse)."""

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
        """Gradients of q, k and v, with the probabilities exp(scores - lse)."""


class FlashOps:
    """torch's operators, as torch.nn.attention.varlen calls them (2.11 to 2.13)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            segments.queries,
            segments.keys,
            segments.longest_query,
            segments.longest_key,
            0.0,
            causal,
            False,
            scale=scale,
            **_window(window),
        )
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
        # Without dropout, nothing reads the random state.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            segments.queries,
            segments.keys,
            segments.longest_query,
            segments.longest_key,
            0.0,
            causal,
            state,
            unused,
            scale=scale,
            **_window(window),
        )


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window, "window_size_right": 0}


def ops_for(query: Tensor) -> VarlenOps | None:
    """The kernels for queries like this one; None if torch has none (on a CPU, for fp32, for odd head sizes)."""
    head = query.shape[-1]
    fits = head <= LARGEST_HEAD and head % HEAD_STEP == 0
    return FlashOps() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and fits else None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PromptLayout,
    *,
    scale: float,
    window: int | None,
    ops: VarlenOps,
) -> Tensor:
    """query [1, H, L, D], key and value [1, H_kv, L, D] -> [1, L, H, D].

    window: how many tokens a query attends to, itself included; None when no sequence is longer.
    """
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    apply = _TwoCalls.apply if window is None else _Windowed.apply
    return apply(*rows, _plan(layout, window, query.device), scale, ops)[None]


# -- positions in the row ----------------------------------------------------------------------------------------------

_Place = slice | Tensor


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The calls for one layout.

    near, far          segments of the two calls; far is None if no rollout has a prompt
    rollouts, prompts  indices in the row of far's queries and keys; a slice if there is one group
    copies             with a window: indices in the row of near's keys, in their order
    """

    near: Segments
    far: Segments | None
    rollouts: _Place
    prompts: _Place
    copies: Tensor | None
    window: int | None


@lru_cache(maxsize=16)
def _plan(layout: PromptLayout, window: int | None, device: torch.device) -> _Plan:
    """Cached: all layers of a forward and backward pass need the same plan, and making it copies data to the GPU."""
    near: list[int] = []
    near_keys: list[int] = []
    copies: list[int] = []
    far = [g for g in layout.groups if g.prompt and any(g.responses)]
    for group in layout.groups:
        before = 0 if window is None else min(group.prompt, window - 1)
        start = group.end_of_prompt
        # Empty segments are left out: kernels make no promise for keys without queries.
        responses = [length for length in group.responses if length]
        near += [group.prompt, *responses] if group.prompt else responses
        near_keys += [group.prompt] if group.prompt else []
        near_keys += [before + length for length in responses]
        copies += range(group.start, start)
        for length in responses:
            copies += [*range(group.end_of_prompt - before, group.end_of_prompt), *range(start, start + length)]
            start += length
    return _Plan(
        near=Segments.of(near, near_keys, device),
        far=Segments.of([g.end - g.end_of_prompt for g in far], [g.prompt for g in far], device) if far else None,
        rollouts=_place([(g.end_of_prompt, g.end) for g in far], device),
        prompts=_place([(g.start, g.end_of_prompt) for g in far], device),
        copies=None if window is None else torch.tensor(copies).to(device),
        window=window,
    )


def _place(spans: list[tuple[int, int]], device: torch.device) -> _Place:
    if len(spans) == 1:
        return slice(*spans[0])  # a view: nothing is copied
    return torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64).to(device)


# -- the calls ---------------------------------------------------------------------------------------------------------


class _TwoCalls(torch.autograd.Function):
    """Tensors are [L, H, D] here, as in the kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float, ops: VarlenOps) -> Tensor:
        out, lse = ops.forward(q, k, v, plan.near, causal=True, scale=scale, window=None)
        if plan.far is not None:
            at, to = plan.rollouts, plan.prompts
            far, far_lse = ops.forward(q[at], k[to], v[to], plan.far, causal=False, scale=scale, window=None)
            near, near_lse = out[at], lse[:, at]
            share = (far_lse - near_lse).sigmoid().T[..., None]
            # Share and sum are in fp32, so there is one rounding. With one group, `near` is a view of the output.
            torch.addcmul(near, share, far - near, out=near)
            if not isinstance(at, slice):
                out[at] = near
            lse[:, at] = torch.logaddexp(far_lse, near_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.ops = plan, scale, ops
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, _dense(grads[0])
        dq, dk, dv = ctx.ops.backward(grad, q, k, v, out, lse, plan.near, causal=True, scale=scale, window=None)
        if plan.far is not None:
            at, to = plan.rollouts, plan.prompts
            far = ctx.ops.backward(
                *(grad[at], q[at], k[to], v[to], out[at], lse[:, at].contiguous(), plan.far),
                causal=False,
                scale=scale,
                window=None,
            )
            # No index occurs twice, so plain indexed addition is right.
            for total, place, part in zip((dq, dk, dv), (at, to, to), far):
                total[place] += part
        return dq, dk, dv, None, None, None


class _Windowed(torch.autograd.Function):
    """For windows shorter than a sequence: one call, in which every rollout has its own copy of the prompt's end."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan, scale: float, ops: VarlenOps) -> Tensor:
        assert plan.copies is not None and plan.window is not None
        ctx.options = dict(causal=True, scale=scale, window=plan.window - 1)
        out, lse = ops.forward(q, k[plan.copies], v[plan.copies], plan.near, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.ops = plan, ops
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        copies = ctx.plan.copies
        dq, *of_copies = ctx.ops.backward(
            _dense(grads[0]), q, k[copies], v[copies], out, lse, ctx.plan.near, **ctx.options
        )
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32  # the copies' gradients add up in fp32
        dk, dv = (
            torch.zeros(k.shape, dtype=dtype, device=k.device).index_add_(0, copies, g.to(dtype)).to(k.dtype)
            for g in of_copies
        )
        return dq, dk, dv, None, None, None


def _dense(grad: Tensor) -> Tensor:
    """The kernels need tensors that are contiguous in the last dimension."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()
