"""The output layer, computed in chunks of rows and so in bounded memory.

Training needs few numbers of each row of logits: the log-probs of some tokens, and the entropy. They are computed
chunk by chunk. What the backward pass needs is kept up to a bound and computed again beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from real_openrlhf.algo.packing import PromptLayout


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a forward pass over a packed row shall compute; see `RealBatch` for the letters.

    layout         how the row is packed
    logit_index    [M] int64: positions in the row whose logits are needed
    row, token     [Q] int64: the picks, that is the log-prob of `token` in the `row`-th of the M rows of logits
    max_bytes      most bytes that logits and other tensors of their size may take together
    entropy_grad   the entropies need a gradient
    moments        also compute the moments, see `LogprobHead.forward`
    """

    layout: PromptLayout
    logit_index: Tensor
    row: Tensor
    token: Tensor
    temperature: float
    max_bytes: int
    entropy_grad: bool = False
    moments: bool = False


class LogprobHead(nn.Linear):
    """A linear output layer that also answers requests.

    An existing layer becomes one by assigning its __class__. So its parameter stays the same object, under the
    same name: an embedding may be tied to it, and DeepSpeed may have sharded it. It must be called as a module
    for a request too, since under ZeRO-3 that call gathers the weight.
    """

    def forward(self, input: Tensor, request: Request | None = None) -> Any:
        """Without a request: logits. With one: input [M, D] -> picks [Q], entropy [M], moments [3, M], fp32 or wider.

        The moments of a row with probabilities p and entropy H are the sums of p^2, of p^2 (log p + H) and of
        p^2 (log p + H)^2. The norm of any loss's gradient at the logits can be computed from them (`term_norms`).
        """
        if request is None:
            # Without gradients, logits are in fp32: they serve comparisons, which rounding would disturb.
            return super().forward(input) if torch.is_grad_enabled() else _logits(input, self.weight, self.bias)
        keep = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        return _Chunked.apply(input, self.weight, self.bias, request, keep)


class _Chunked(torch.autograd.Function):
    """Log-softmax over chunks of rows.

    The gradient at a row's logits is (sum_i g_i (onehot_i - p) - h p (log p + H)) / T, where g_i is the gradient
    of the row's pick i, and h that of its entropy H.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: Request, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.chunks = _Chunks(request, len(hidden), len(weight))
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        picks = hidden.new_zeros(len(request.row), dtype=dtype)
        entropy = hidden.new_zeros(len(hidden), dtype=dtype)
        moments = hidden.new_zeros(3, len(hidden) if request.moments else 0, dtype=dtype)
        kept_bytes, ctx.kept = 0, {}
        for rows, mine in ctx.chunks:
            logprobs = _logprobs(hidden[rows], weight, bias, request.temperature)
            picks[mine] = logprobs[request.row[mine] - rows.start, request.token[mine]]
            probs = logprobs.exp()
            entropy[rows] = -torch.einsum("mv,mv->m", probs, logprobs)
            if request.moments:
                moments[:, rows] = _moments(probs, logprobs, entropy[rows])
            size = probs.numel() * probs.element_size()
            if keep and kept_bytes + size <= request.max_bytes // 2:
                ctx.kept[rows.start] = probs
                kept_bytes += size
        ctx.entropy = entropy if request.entropy_grad else None
        ctx.mark_non_differentiable(*([moments] if request.entropy_grad else [entropy, moments]))
        return picks, entropy, moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        request, kept, grad_entropy = ctx.chunks.request, ctx.kept, grads[1]
        ctx.kept = {}  # overwritten below; a second backward computes them again
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_picks = hidden.new_zeros(len(request.row), dtype=dtype) if grads[0] is None else grads[0]
        total = hidden.new_zeros(len(hidden), dtype=dtype).index_add(0, request.row, grad_picks)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Chunks are added up in fp32, whatever the weight's dtype, and rounded once.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        for rows, mine in ctx.chunks:
            probs = kept.pop(rows.start, None)
            if probs is None:
                probs = _logprobs(hidden[rows], weight, bias, request.temperature).exp_()
            if grad_entropy is None or ctx.entropy is None:
                grad = probs.mul_(-total[rows, None])
            else:
                h = grad_entropy[rows, None]
                grad = torch.special.xlogy(probs, probs).mul_(-h)
                grad.sub_(probs.mul_(total[rows, None] + h * ctx.entropy[rows, None]))
            grad.index_put_((request.row[mine] - rows.start, request.token[mine]), grad_picks[mine], accumulate=True)
            if request.temperature != 1.0:
                grad = grad.div_(request.temperature)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows])
        of_parameters = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        return grad_hidden, *of_parameters, None, None


class _Chunks:
    """The chunks of M rows: for each, the slice of its rows and the indices of its picks.

    A chunk may take an eighth of the bound: at most three tensors of its size are alive at once, besides
    narrower copies, and half of the bound is for what is kept for the backward pass.
    """

    def __init__(self, request: Request, n_rows: int, vocabulary: int) -> None:
        self.request = request
        size = max(1, request.max_bytes // 8 // (4 * vocabulary))
        self.rows = [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
        order = request.row.argsort()
        edges = torch.tensor([rows.stop for rows in self.rows], dtype=torch.int64, device=order.device)
        counts = torch.searchsorted(request.row[order], edges).diff(prepend=edges.new_zeros(1)).tolist()
        self.picks = order.split(counts) if self.rows else ()

    def __iter__(self) -> Any:
        return iter(zip(self.rows, self.picks, strict=True))


def _logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[m, V] in fp32 or wider."""
    logits = _logits(hidden, weight, bias)
    return (logits if temperature == 1.0 else logits.div_(temperature)).log_softmax(-1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., V] in fp32 or wider, for a bf16 model too: rounded to bf16, logits of 30 would be off by up to 0.06."""
    if hidden.dtype in (torch.float32, torch.float64):
        return nn.functional.linear(hidden, weight, bias)
    if hidden.is_cuda:
        logits = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, hidden.shape[:-1])
    else:
        logits = hidden.float() @ weight.float().T
    return logits if bias is None else logits.add_(bias)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than both."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _moments(probs: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """[3, m]; overwrites logprobs."""
    centred = logprobs.add_(entropy[:, None])
    squares = probs * probs
    first = squares.sum(-1)
    second = torch.einsum("mv,mv->m", squares, centred)
    third = torch.einsum("mv,mv->m", squares.mul_(centred), centred)
    return torch.stack([first, second, third])
