"""Log-probs by chunks against whole log-softmaxes, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from real_openrlhf.actors.policy.logprob_head import LogprobHead, Request
from real_openrlhf.algo.packing import layout_of

ROWS, WIDTH, VOCABULARY = 9, 5, 13
TEMPERATURE = 0.7
LAYOUT = layout_of([(1, (1,))])  # the head does not look at it
# Rows without a pick, with several, and with the same one twice.
PICKS = [(0, 3), (0, 4), (2, 1), (2, 1), (3, 0), (8, 12), (5, 5), (7, 2), (0, 3)]


def request(max_bytes: int = 2**20, *, picks: list[tuple[int, int]] = PICKS, **options: bool) -> Request:
    row, token = torch.tensor(picks, dtype=torch.int64).view(-1, 2).T
    index = torch.arange(ROWS)
    return Request(
        layout=LAYOUT,
        logit_index=index,
        row=row,
        token=token,
        temperature=TEMPERATURE,
        max_bytes=max_bytes,
        **options,
    )


def make_head(*, bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[LogprobHead, Tensor]:
    torch.manual_seed(0)
    head = LogprobHead(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.mul_(4)
    return head, torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)


def exact(head: LogprobHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (torch.nn.functional.linear(hidden, head.weight, head.bias) / TEMPERATURE).log_softmax(-1)
    row, token = torch.tensor(PICKS).T
    return logprobs[row, token], -(logprobs.exp() * logprobs).sum(-1)


# All at once; two rows per chunk, with and without room to keep any; one row.
@pytest.mark.parametrize("max_bytes", [2**20, 8 * 2 * 4 * VOCABULARY, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_values_and_gradients(max_bytes: int, bias: bool, entropy_grad: bool) -> None:
    head, hidden = make_head(bias=bias)
    picks, entropy, _ = head(hidden, request(max_bytes, entropy_grad=entropy_grad))
    want_picks, want_entropy = exact(head, hidden)
    torch.testing.assert_close(picks, want_picks, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-12)
    assert entropy.requires_grad == entropy_grad
    up, up_entropy = torch.randn(len(PICKS), dtype=torch.float64), torch.randn(ROWS, dtype=torch.float64)
    leaves = [hidden, *head.parameters()]
    loss, want_loss = up @ picks, up @ want_picks
    if entropy_grad:
        loss, want_loss = loss + up_entropy @ entropy, want_loss + up_entropy @ want_entropy
    want = torch.autograd.grad(want_loss, leaves)
    # Twice: what was kept is used up by the first.
    for retain in (True, False):
        for mine, theirs in zip(torch.autograd.grad(loss, leaves, retain_graph=retain), want):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_moments() -> None:
    head, hidden = make_head()
    moments = head(hidden, request(1, moments=True))[2]
    logprobs = (head(hidden) / TEMPERATURE).log_softmax(-1)
    squares = logprobs.exp() ** 2
    centred = logprobs - (logprobs.exp() * logprobs).sum(-1, keepdim=True)
    want = torch.stack([squares.sum(-1), (squares * centred).sum(-1), (squares * centred**2).sum(-1)])
    torch.testing.assert_close(moments, want, rtol=0, atol=1e-12)
    assert head(hidden, request())[2].shape == (3, 0)


def test_frozen_weights_and_no_grad() -> None:
    head, hidden = make_head()
    head.weight.requires_grad_(False)
    picks = head(hidden, request())[0]
    want = torch.autograd.grad(exact(head, hidden)[0].sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(picks.sum(), hidden), want, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert not head(hidden, request())[0].requires_grad


def test_no_rows() -> None:
    head, hidden = make_head()
    picks, entropy, _ = head(hidden[:0], request(picks=[]))
    assert picks.shape == entropy.shape == (0,)
    picks.sum().backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_without_a_request_it_is_a_linear_layer() -> None:
    head, hidden = make_head(bias=True)
    assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, head.weight, head.bias))


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_rounds_neither_logits_nor_sums(bias: bool) -> None:
    """Log-probs are those of the bf16 weights in exact arithmetic; gradients are rounded once, over many chunks."""
    head, hidden = make_head(bias=bias, dtype=torch.bfloat16)
    picks, _, _ = head(hidden, request(1))
    copy, inner = make_head(bias=bias)
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), head.parameters()):
            mine.copy_(theirs)
        inner.copy_(hidden)
    wanted = exact(copy, inner)[0]
    assert picks.dtype == torch.float32
    torch.testing.assert_close(picks.double(), wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = head(hidden[None])
    assert logits.dtype == torch.float32 and logits.shape == (1, ROWS, VOCABULARY)
    torch.testing.assert_close(logits[0].double(), copy(inner), rtol=0, atol=1e-5)
    picks.sum().backward()
    want = torch.autograd.grad(wanted.sum(), (inner, *copy.parameters()))
    for mine, theirs in zip((hidden, *head.parameters()), want, strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.bfloat16
        assert float((mine.grad.double() - theirs).norm() / theirs.norm()) < 0.004


def test_gradients_of_many_chunks_add_up_in_fp32() -> None:
    """Each chunk adds the same small number: summed in bf16, the total would stop growing at 256 times of it."""
    head = LogprobHead(1, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.zero_()
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    every = torch.arange(1000)
    ask = Request(
        layout=LAYOUT, logit_index=every, row=every, token=torch.zeros_like(every), temperature=1.0, max_bytes=1
    )
    head(hidden, ask)[0].sum().backward()
    assert head.weight.grad is not None and head.weight.grad.flatten().tolist() == [500.0, -500.0]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor with a dimension of the vocabulary's size that any operation returns."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.bytes = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            # The gradient of the weight has one such dimension, too, but not for any number of rows.
            if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == self.vocabulary:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


@pytest.mark.parametrize("n_rows", [64, 1024])
def test_memory_is_bounded_however_many_rows_there_are(n_rows: int) -> None:
    vocabulary, max_bytes = 5000, 2**22
    torch.manual_seed(0)
    head = LogprobHead(WIDTH, vocabulary, bias=False)
    hidden = torch.randn(n_rows, WIDTH, requires_grad=True)
    many = Request(
        layout=LAYOUT,
        logit_index=torch.arange(n_rows),
        row=torch.arange(n_rows),
        token=torch.arange(n_rows) % vocabulary,
        temperature=1.0,
        max_bytes=max_bytes,
        entropy_grad=True,
        moments=True,
    )
    with Largest(vocabulary) as largest:
        picks, entropy, _ = head(hidden, many)
        kept = sum(p.numel() * p.element_size() for p in picks.grad_fn.kept.values())
        (picks.sum() + entropy.sum()).backward()
    assert max_bytes / 16 < largest.bytes <= max_bytes / 8
    assert 0 < kept <= max_bytes / 2
    whole = hidden.detach().requires_grad_()
    logprobs = (whole @ head.weight.detach().T).log_softmax(-1)
    want = logprobs[many.row, many.token].sum() - (logprobs.exp() * logprobs).sum()
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(want, whole)[0], rtol=1e-4, atol=1e-5)
