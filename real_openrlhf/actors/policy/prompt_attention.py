"""Attention over a packed row: every rollout attends to its group's prompt and to itself.

transformers' attention layers call it through its AttentionInterface, under the name PROMPT_ATTENTION. The row's
`PromptLayout` arrives as the keyword argument "layout", which the layers pass on (also when gradient checkpointing
computes them again). There is never a mask over the whole row: in each group, attention within the prompt is causal,
and the rollouts attend to the prompt and to themselves.

Several ways compute the same: `varlen_attention` on GPUs in bf16; on CPUs one call for all groups where each prompt has
a single rollout, and two parts of torch's flash kernel where it has several; and everywhere else (fp32 on a GPU,
dropout, "eager", windows on a CPU) one call of sdpa per part.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from real_openrlhf.actors.policy.varlen_attention import ops_for, varlen_attention
from real_openrlhf.algo.packing import PackedGroup, PromptLayout
from real_openrlhf.common.errors import RunError

PROMPT_ATTENTION = "real_prompt_attention"
# Arguments by which some models change what attention computes; none of them is supported here.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")


def prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PromptLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    exact: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, L, D], key and value [1, H_kv, L, D] -> [1, L, H, D]; attention_mask is ignored.

    exact: use torch's unfused kernel, as --ds.attn_implementation eager asks for.
    """
    if layout is None:
        raise ValueError("a forward without a layout cannot run on the packed row's attention")
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise RunError(
                f"--actor.model_name_or_path: {type(module).__name__} asks for {name!r}, which attention over shared "
                "prompts does not have; Llama, Mistral, Qwen2 and Qwen3 models work"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bites = sliding_window is not None and max(g.longest for g in layout.groups) > sliding_window
    kernels = None if exact or dropout else ops_for(query)
    if kernels is not None:
        window = sliding_window if bites else None
        return varlen_attention(query, key, value, layout, scale=scale, window=window, ops=kernels), None
    plain = query.device.type == "cpu" and not (exact or dropout or bites)
    if plain and len(layout.groups) > 1 and all(len(group.responses) == 1 for group in layout.groups):
        return _single_rollouts(query, key, value, layout, scale), None
    if plain:
        return _TwoParts.apply(query, key, value, layout, scale), None
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
        parts = [_group(query, key, value, g, scale, dropout, sliding_window) for g in layout.groups]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PROMPT_ATTENTION, prompt_attention)


# -- CPU, one rollout per prompt: plain causal rows -----------------------------------------------------------


def _single_rollouts(query: Tensor, key: Tensor, value: Tensor, layout: PromptLayout, scale: float) -> Tensor:
    """[1, L, H, D]: each prompt with its only rollout is one causal sequence; they are padded to the longest.

    Calls per group would cost more than their arithmetic where sequences are short, as in a warm-up.
    """
    lengths = torch.tensor([group.end - group.start for group in layout.groups])
    starts = torch.tensor([group.start for group in layout.groups])
    column = torch.arange(int(lengths.max()))
    # Padding repeats the last token; under a causal mask no real token sees it.
    pads = (starts[:, None] + torch.minimum(column, lengths[:, None] - 1)).flatten()
    places = (column < lengths[:, None]).flatten().nonzero()[:, 0]
    heads = query.shape[1] // key.shape[1]

    def rows(x: Tensor) -> Tensor:  # [1, H, L, D] -> [groups, H, width, D]
        return x.index_select(2, pads).unflatten(2, (len(lengths), -1))[0].transpose(0, 1)

    out = scaled_dot_product_attention(
        rows(query), _repeat(rows(key), heads), _repeat(rows(value), heads), is_causal=True, scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, places)[None]


# -- any device: one call of sdpa per part --------------------------------------------------------------------


def _group(
    query: Tensor, key: Tensor, value: Tensor, group: PackedGroup, scale: float, dropout: float, window: int | None
) -> Tensor:
    """[1, H, tokens of the group, D]. Rollouts are padded to the longest one; each has a copy of the prompt's keys."""
    heads = query.shape[1] // key.shape[1]
    prompt = slice(group.start, group.end_of_prompt)
    q, k, v = query[:, :, prompt], _repeat(key[:, :, prompt], heads), _repeat(value[:, :, prompt], heads)
    mask = None if window is None or group.prompt <= window else _mask(group.prompt, 0, window, q.device)
    out = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale)
    if not any(group.responses):
        return out
    pads, places = _padding(group, query.device)
    width = len(pads) // _n(group)

    def padded(x: Tensor) -> Tensor:  # [1, H, tokens, D] -> [K, H, width, D]
        return x[:, :, pads].unflatten(2, (-1, width))[0].transpose(0, 1)

    def after_the_prompt(x: Tensor) -> Tensor:
        own = padded(x)
        return _repeat(torch.cat([x[:, :, prompt].expand(len(own), -1, -1, -1), own], dim=2), heads)

    mask = _mask(width, group.prompt, window, q.device)
    own = scaled_dot_product_attention(
        padded(query), after_the_prompt(key), after_the_prompt(value), mask, dropout, scale=scale
    )
    return torch.cat([out, own.transpose(0, 1).flatten(1, 2)[None, :, places]], dim=2)


def _mask(width: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """[width, before + width] bool: causal, and within the window. Padding is at the end, so it needs no masking."""
    row = before + torch.arange(width, device=device)[:, None]
    column = torch.arange(before + width, device=device)
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def _repeat(x: Tensor, times: int) -> Tensor:
    """Repeat keys or values of grouped-query attention, once per query head."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _n(group: PackedGroup) -> int:
    return sum(length > 0 for length in group.responses)


def _padding(group: PackedGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices from packed to padded, [K * width] into the row, and back, [tokens of the rollouts] into the padded.

    Padding repeats the rollout's last token; under a causal mask no real token sees it.
    """
    lengths = torch.tensor([length for length in group.responses if length])
    starts = group.end_of_prompt + lengths.cumsum(0) - lengths
    column = torch.arange(int(lengths.max()))
    pads = starts[:, None] + torch.minimum(column, lengths[:, None] - 1)
    places = (column < lengths[:, None]).flatten().nonzero()[:, 0]
    return pads.flatten().to(device), places.to(device)


# -- CPU: two parts, merged by their log-sum-exps -------------------------------------------------------------

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _TwoParts(torch.autograd.Function):
    """The same with torch's flash kernel for CPUs, without a copy of the prompt's keys per rollout.

    All rollouts of a group attend to the prompt in one call ("far"), and to themselves in another ("near"). The two
    softmaxes, each over a part of the keys, are merged by their log-sum-exps. In the backward pass each call gets
    the merged output and log-sum-exp, so that its probabilities are those of the softmax over all keys.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PromptLayout, scale: float) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        packed = out.transpose(1, 2)
        sums: list[Tensor] = []
        for group in layout.groups:
            part = _Group(group, query, key, value, scale)
            packed[:, :, part.prompt], lse = part.within_prompt()
            sums.append(lse)
            if any(group.responses):
                packed[:, :, part.rollouts], lse = part.merged()
                sums.append(lse)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        grad, out = grads[0].transpose(1, 2), out.transpose(1, 2)
        totals = [torch.empty_like(x) for x in (query, key, value)]
        left = iter(sums)
        for group in ctx.layout.groups:
            part = _Group(group, query, key, value, ctx.scale)
            span = part.prompt
            for total, g in zip(totals, part.within_prompt_backward(grad[:, :, span], out[:, :, span], next(left))):
                total[:, :, span] = g
            if any(group.responses):
                dq, dk, dv, own_k, own_v = part.merged_backward(grad, out, next(left))
                totals[0][:, :, part.rollouts] = dq
                for total, g, own in ((totals[1], dk, own_k), (totals[2], dv, own_v)):
                    total[:, :, span] += g
                    total[:, :, part.rollouts] = own
        return (*totals, None, None)


class _Group:
    """The calls of one group. `heads`: query heads per key head."""

    def __init__(self, group: PackedGroup, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.query, self.key, self.value, self.scale = query, key, value, scale
        self.n_keys, self.heads = key.shape[1], query.shape[1] // key.shape[1]
        self.prompt = slice(group.start, group.end_of_prompt)
        self.rollouts = slice(group.end_of_prompt, group.end)
        lengths = {length for length in group.responses if length}
        self.width = max(lengths, default=0)
        # Rollouts of equal length need no padding, so no indices either.
        self.index = None if len(lengths) < 2 else _padding(group, query.device)

    def within_prompt(self) -> tuple[Tensor, Tensor]:
        q, k, v = self._prompt()
        return _flash(q, _repeat(k, self.heads), _repeat(v, self.heads), 0.0, True, scale=self.scale)

    def within_prompt_backward(self, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._prompt()
        k, v = _repeat(k, self.heads), _repeat(v, self.heads)
        dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, 0.0, True, scale=self.scale)
        return dq, self._sum(dk), self._sum(dv)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Output [1, H, tokens, D] and log-sum-exp [1, H, tokens] of all rollouts."""
        _, k, v = self._prompt()
        far, far_lse = _flash(self._fold(self.query[:, :, self.rollouts]), k, v, 0.0, False, scale=self.scale)
        far, far_lse = self._unfold(far), self._unfold(far_lse)
        near, near_lse = _flash(*self._own(), 0.0, True, scale=self.scale)
        near, near_lse = self._packed(near), self._packed(near_lse)
        lse = torch.logaddexp(far_lse, near_lse)
        # The log-sum-exps are in fp32 even if the rest is bf16, and so is the sum, which is rounded once.
        return far * (far_lse - lse).exp()[..., None] + near * (near_lse - lse).exp()[..., None], lse

    def merged_backward(self, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the rollouts' queries, of the prompt's keys and values, and of the rollouts' own."""
        _, k, v = self._prompt()
        q, g, o = (self._fold(x[:, :, self.rollouts]) for x in (self.query, grad, out))
        dq, dk, dv = _flash_backward(g, q, k, v, o, self._fold(lse), 0.0, False, scale=self.scale)
        g, o, padded_lse = self._padded(grad), self._padded(out), self._padded(lse, packed=self.rollouts.start)
        if self.index is not None:
            # Padding repeats real tokens, whose gradients must not count twice.
            real = torch.zeros(g.shape[0] * self.width, dtype=torch.bool)
            real[self.index[1]] = True
            g = g * real.view(-1, 1, self.width, 1)
        own = _flash_backward(g, *self._own(), o, padded_lse, 0.0, True, scale=self.scale)
        own_q, own_k, own_v = (self._packed(x) for x in own)
        return self._unfold(dq) + own_q, dk, dv, self._sum(own_k), self._sum(own_v)

    def _prompt(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query[:, :, self.prompt], self.key[:, :, self.prompt], self.value[:, :, self.prompt]

    def _own(self) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self._padded(self.key), self._padded(self.value)
        return self._padded(self.query), _repeat(k, self.heads), _repeat(v, self.heads)

    def _padded(self, x: Tensor, packed: int = 0) -> Tensor:
        """[1, H, tokens, ...] -> [K, H, width, ...]; packed: where in the row x begins."""
        if self.index is None:
            x = x[:, :, self.rollouts.start - packed : self.rollouts.stop - packed]
        else:
            x = x.index_select(2, self.index[0] - packed)
        return x.unflatten(2, (-1, self.width))[0].transpose(0, 1).contiguous()

    def _packed(self, x: Tensor) -> Tensor:
        """The inverse: [K, H, width, ...] -> [1, H, tokens of the rollouts, ...]."""
        x = x.transpose(0, 1).flatten(1, 2)[None]
        return x if self.index is None else x.index_select(2, self.index[1])

    def _fold(self, x: Tensor) -> Tensor:
        """Turn the query heads of one key head into further queries: [1, H, n, ...] -> [1, H_kv, heads * n, ...].

        Attention to the prompt is not causal, so grouped-query attention needs no copies of its keys.
        """
        return x.unflatten(1, (self.n_keys, self.heads)).flatten(2, 3).contiguous()

    def _unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).flatten(1, 2)

    def _sum(self, x: Tensor) -> Tensor:
        """Add up the gradients of repeated keys or values."""
        return x if self.heads == 1 else x.unflatten(1, (self.n_keys, self.heads)).sum(2)
