"""flash-attn's Python part on torch's copy of its kernels, for machines where its own were not compiled.

flash_attn 2.8.3 calls a compiled module `flash_attn_2_cuda`. If that is an empty placeholder, `install` gives it the
four functions that training needs, made of the operators that torch itself ships (FlashAttention 2, see
`varlen_attention.FlashOps`). OpenRLHF, transformers and flash_attn stay as they are. Options that are not needed here
(dropout, windows, softcap, ALiBi, paged keys) are refused.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.actors.policy.varlen_attention import FlashOps, Segments, VarlenOps
from real_openrlhf.common.device import flash_attn_available

OVERRIDE = (
    "flash_attn_2_cuda: flash-attn's kernels are not compiled here; the same FlashAttention 2 kernels from torch's "
    "copy (torch.ops.aten._flash_attention_forward and _backward) are used, with one more copy of each gradient"
)


def install(ops: VarlenOps | None = None) -> bool:
    """Fill the placeholder. False if flash-attn's own kernels are there; ImportError if flash_attn is not installed.

    ops: replaces torch's kernels in tests.
    """
    if ops is None and flash_attn_available():
        return False
    kernels = _Kernels(ops or FlashOps())
    module: Any = importlib.import_module("flash_attn_2_cuda")
    for name in ("fwd", "bwd", "varlen_fwd", "varlen_bwd"):
        setattr(module, name, getattr(kernels, name))
    importlib.import_module("flash_attn")
    return True


class _Kernels:
    """Arguments and results as flash_attn_interface.py passes them by position: outputs, then log-sum-exps in fp32."""

    def __init__(self, ops: VarlenOps) -> None:
        self.ops = ops

    def varlen_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        ends_q: Tensor,
        ends_k: Tensor,
        used_k: Tensor | None,
        left_pad: Tensor | None,
        blocks: Tensor | None,
        alibi: Tensor | None,
        longest_q: int,
        longest_k: int,
        dropout: float,
        scale: float,
        zero: bool,
        causal: bool,
        left: int,
        right: int,
        softcap: float,
        return_softmax: bool,
        generator: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[T, H, D] -> output, lse [H, T], and two placeholders."""
        absent = (out, used_k, left_pad, blocks, alibi, generator)
        _refuse(absent, dropout, (left, right), causal, softcap, return_softmax)
        segments = _segments(ends_q, ends_k, longest_q, longest_k)
        result, lse = self.ops.forward(q, k, v, segments, causal=causal, scale=scale, window=None)
        return result, lse, *_placeholders(q)

    def varlen_bwd(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        ends_q: Tensor,
        ends_k: Tensor,
        alibi: Tensor | None,
        longest_q: int,
        longest_k: int,
        dropout: float,
        scale: float,
        zero: bool,
        causal: bool,
        left: int,
        right: int,
        softcap: float,
        deterministic: bool,
        generator: Any,
        random_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fills dq, dk and dv."""
        _refuse((alibi, generator), dropout, (left, right), causal, softcap, deterministic)
        segments = _segments(ends_q, ends_k, longest_q, longest_k)
        found = self.ops.backward(grad, q, k, v, out, lse, segments, causal=causal, scale=scale, window=None)
        for given, gradient in zip((dq, dk, dv), found, strict=True):
            given.copy_(gradient)
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32)

    def fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        alibi: Tensor | None,
        dropout: float,
        scale: float,
        causal: bool,
        left: int,
        right: int,
        softcap: float,
        return_softmax: bool,
        generator: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, H, D] -> output, lse [B, H, T], and two placeholders."""
        _refuse((out, alibi, generator), dropout, (left, right), causal, softcap, return_softmax)
        segments = _whole_rows(q, k)
        result, lse = self.ops.forward(_flat(q), _flat(k), _flat(v), segments, causal=causal, scale=scale, window=None)
        return result.view(q.shape), lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1).contiguous(), *_placeholders(q)

    def bwd(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        alibi: Tensor | None,
        dropout: float,
        scale: float,
        causal: bool,
        left: int,
        right: int,
        softcap: float,
        deterministic: bool,
        generator: Any,
        random_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fills dq, dk and dv."""
        _refuse((alibi, generator), dropout, (left, right), causal, softcap, deterministic)
        flat_lse = lse.transpose(0, 1).reshape(q.shape[2], -1).contiguous()
        found = self.ops.backward(
            *(_flat(grad), _flat(q), _flat(k), _flat(v), _flat(out), flat_lse, _whole_rows(q, k)),
            causal=causal,
            scale=scale,
            window=None,
        )
        for given, gradient in zip((dq, dk, dv), found, strict=True):
            given.copy_(gradient.view(given.shape))
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def _segments(ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int) -> Segments:
    return Segments(queries=ends_q, keys=ends_k, longest_query=int(longest_q), longest_key=int(longest_k))


def _whole_rows(q: Tensor, k: Tensor) -> Segments:
    """Every row of a batch is a segment."""
    of_q, of_k = (
        torch.arange(0, (len(x) + 1) * x.shape[1], x.shape[1], dtype=torch.int32, device=x.device) for x in (q, k)
    )
    return _segments(of_q, of_k, q.shape[1], k.shape[1])


def _placeholders(q: Tensor) -> tuple[Tensor, Tensor]:
    """Placeholders for attention probabilities and random state, which are not used."""
    return q.new_empty(0), torch.zeros(2, dtype=torch.int64, device=q.device)


def _refuse(
    absent: tuple[Any, ...], dropout: float, window: tuple[int, int], causal: bool, softcap: float, other: bool
) -> None:
    """NotImplementedError for options that are not supported here."""
    # Causal attention never sees the right side, whether the window says so or not.
    wide = window[0] < 0 and (window[1] < 0 or (causal and window[1] == 0))
    if any(x is not None for x in absent) or dropout or not wide or softcap or other:
        raise NotImplementedError("torch's flash attention replaces flash-attn here without any of its options")
