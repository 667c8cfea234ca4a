"""Attention over a packed row equals softmax under the full mask, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from real_openrlhf.actors.policy.prompt_attention import prompt_attention
from real_openrlhf.algo.packing import PromptLayout, layout_of
from real_openrlhf.common.errors import RunError

SCALE = 0.3
# Prompts with the lengths of their rollouts: equal, ragged, one token, none.
LAYOUTS = {
    "equal": [(5, (3, 3, 3))],
    "ragged": [(5, (3, 1, 4)), (7, (2, 5)), (1, (1,))],
    "empty": [(3, (0, 2)), (4, ()), (2, (0,))],
    "single": [(5, (3,)), (2, (7,)), (1, (1,)), (4, (0,))],
}


def allowed(lengths: list[tuple[int, tuple[int, ...]]], window: int | None) -> Tensor:
    """[L, L] bool, written out from the definition: who sees whom."""
    who: list[tuple[int, int | None, int]] = []  # group, rollout or None for the prompt, position
    for g, (prompt, responses) in enumerate(lengths):
        who += [(g, None, t) for t in range(prompt)]
        who += [(g, k, prompt + t) for k, n in enumerate(responses) for t in range(n)]

    def sees(query: tuple[int, int | None, int], key: tuple[int, int | None, int]) -> bool:
        past = key[2] <= query[2] and (window is None or query[2] - key[2] < window)
        return past and query[0] == key[0] and key[1] in (None, query[1])

    return torch.tensor([[sees(query, key) for key in who] for query in who])


def draw(layout: PromptLayout, dtype: torch.dtype, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (6, n_keys, n_keys)
    q, k, v = (torch.randn(1, layout.n_tokens, h, 8, dtype=dtype).transpose(1, 2).requires_grad_() for h in heads)
    return q, k, v


@pytest.mark.parametrize("n_keys", [6, 2, 1])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"sliding_window": 12}, {"exact": True}], ids=str)
def test_values_and_gradients(kind: str, n_keys: int, options: dict[str, Any]) -> None:
    lengths = LAYOUTS[kind]
    layout = layout_of(lengths)
    q, k, v = draw(layout, torch.float64, n_keys)
    keys, values = (x.repeat_interleave(6 // n_keys, dim=1) for x in (k, v))
    scores = (q @ keys.transpose(-1, -2) * SCALE).masked_fill(~allowed(lengths, options.get("sliding_window")), -1e30)
    want = (scores.softmax(-1) @ values).transpose(1, 2)
    got, weights = prompt_attention(torch.nn.Module(), q, k, v, None, layout=layout, scaling=SCALE, **options)
    assert weights is None and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    upstream = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (got, want))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    layout = layout_of(LAYOUTS["ragged"])
    q, k, v = draw(layout, dtype, 2)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    got = prompt_attention(torch.nn.Module(), q, k, v, None, layout=layout)[0]
    want = prompt_attention(torch.nn.Module(), *exact, None, layout=layout)[0]
    assert got.dtype == dtype
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), exact)):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> bool:
        """Whether any of them is one of torch's fused attention kernels, which never show their softmax."""
        return any("scaled_dot_product" in name for name in self.names)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("exact", [False, True])
def test_exact_alone_runs_the_unfused_kernel(exact: bool, window: int | None) -> None:
    layout = layout_of(LAYOUTS["ragged"])
    q, k, v = draw(layout, torch.float32, 2)
    with Operators() as ran:
        prompt_attention(torch.nn.Module(), q, k, v, None, layout=layout, sliding_window=window, exact=exact)
    assert ran.fused is not exact
    assert any("softmax" in name for name in ran.names) is exact


def test_dropout_falls_on_prompts_and_rollouts() -> None:
    """Equal scores and values of 1: of n probabilities 1/n each is either gone or doubled."""
    layout = layout_of([(1, (1, 1))])
    zeros = torch.zeros(1, 64, 3, 8)
    torch.manual_seed(0)
    out = prompt_attention(torch.nn.Module(), zeros, zeros, zeros + 1, None, layout=layout, dropout=0.5)[0][0]
    assert [out[t].unique().tolist() for t in range(3)] == [[0, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask"])
def test_arguments_that_change_attention_are_refused(name: str) -> None:
    layout = layout_of([(2, (1,))])
    q, k, v = draw(layout, torch.float32, 6)
    absent, present = {name: None}, {name: torch.zeros(6)}
    prompt_attention(torch.nn.Module(), q, k, v, None, layout=layout, **absent)
    with pytest.raises(RunError, match=f"Module asks for '{name}'"):
        prompt_attention(torch.nn.Module(), q, k, v, None, layout=layout, **present)


def test_a_forward_without_a_layout_is_refused() -> None:
    q, k, v = draw(layout_of([(2, (1,))]), torch.float32, 6)
    with pytest.raises(ValueError, match="without a layout"):
        prompt_attention(torch.nn.Module(), q, k, v, None)
