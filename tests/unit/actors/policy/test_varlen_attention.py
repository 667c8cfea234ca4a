"""Two varlen calls equal softmax under the full mask, with plain torch in the place of the kernels."""

from __future__ import annotations

import pytest
import torch

from real_openrlhf.actors.policy import prompt_attention as module
from real_openrlhf.actors.policy.varlen_attention import ops_for, varlen_attention
from real_openrlhf.algo.packing import layout_of
from tests.helpers.varlen_ops import PlainOps
from tests.unit.actors.policy.test_prompt_attention import LAYOUTS, SCALE, allowed, draw

MORE = {**LAYOUTS, "one token each": [(1, (1,)), (3, (1, 1, 1))], "single": [(9, (2, 6, 1, 1))]}


@pytest.mark.parametrize("n_keys", [6, 2, 1])
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("window", [None, 4, 1, 12])
def test_values_and_gradients(kind: str, n_keys: int, window: int | None) -> None:
    lengths = MORE[kind]
    layout = layout_of(lengths)
    q, k, v = draw(layout, torch.float64, n_keys)
    keys, values = (x.repeat_interleave(6 // n_keys, dim=1) for x in (k, v))
    scores = (q @ keys.transpose(-1, -2) * SCALE).masked_fill(~allowed(lengths, window), -1e30)
    want = (scores.softmax(-1) @ values).transpose(1, 2)
    got = varlen_attention(q, k, v, layout, scale=SCALE, window=window, ops=PlainOps())
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    upstream = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (got, want))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bf16_is_as_good_as_its_rounding() -> None:
    """The stand-in rounds where the kernels do: to bf16 at each output."""
    layout = layout_of(MORE["ragged"])
    q, k, v = draw(layout, torch.bfloat16, 2)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    got = varlen_attention(q, k, v, layout, scale=SCALE, window=None, ops=PlainOps())
    want = varlen_attention(*exact, layout, scale=SCALE, window=None, ops=PlainOps())
    assert got.dtype == torch.bfloat16
    upstream = torch.randn_like(got)
    mine = [got, *torch.autograd.grad(got, (q, k, v), upstream)]
    theirs = [want, *torch.autograd.grad(want, exact, upstream.double())]
    for a, b in zip(mine, theirs):
        assert float(((a.double() - b).norm() / b.norm()).detach()) < 2 * torch.finfo(torch.bfloat16).eps


def test_one_group_takes_two_calls_and_copies_nothing() -> None:
    """Queries and keys of the far call are views of the row's."""
    layout = layout_of([(5, (3, 1, 4))])
    q, k, v = draw(layout, torch.float32, 2)
    seen: list[tuple[int, int]] = []

    class Ops(PlainOps):
        def forward(self, q, k, v, segments, **options):  # type: ignore[no-untyped-def]
            seen.append((q.untyped_storage().data_ptr(), k.untyped_storage().data_ptr()))
            return super().forward(q, k, v, segments, **options)

    ops = Ops()
    varlen_attention(q, k, v, layout, scale=SCALE, window=None, ops=ops)
    storages = (q.untyped_storage().data_ptr(), k.untyped_storage().data_ptr())
    assert seen == [storages, storages]
    (causal, near, _), (far_causal, far, _) = ops.calls
    assert (causal, near.queries.tolist(), near.longest_key) == (True, [0, 5, 8, 9, 13], 5)
    assert (far_causal, far.queries.tolist(), far.keys.tolist()) == (False, [0, 8], [0, 5])
    assert near.queries.dtype == torch.int32


def test_groups_without_rollouts_are_not_in_the_far_call() -> None:
    layout = layout_of(MORE["empty"])
    q, k, v = draw(layout, torch.float32, 2)
    ops = PlainOps()
    varlen_attention(q, k, v, layout, scale=SCALE, window=None, ops=ops)
    assert [segments.queries.tolist() for _, segments, _ in ops.calls] == [[0, 3, 5, 9, 11], [0, 2]]
    nothing = PlainOps()
    q, k, v = draw(layout_of([(3, ())]), torch.float32, 2)
    varlen_attention(q, k, v, layout_of([(3, ())]), scale=SCALE, window=None, ops=nothing)
    assert len(nothing.calls) == 1


def test_models_come_this_way_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch: the kernels where there are some, a window only where it bites, never with dropout or eager."""
    layout = layout_of([(5, (3, 1, 4))])
    q, k, v = draw(layout, torch.float64, 2)
    ops = PlainOps()
    monkeypatch.setattr(module, "ops_for", lambda query: ops)
    attend = module.prompt_attention
    got = attend(torch.nn.Module(), q, k, v, None, layout=layout, scaling=SCALE, sliding_window=9)[0]
    assert [window for _, _, window in ops.calls] == [None, None]
    attend(torch.nn.Module(), q, k, v, None, layout=layout, scaling=SCALE, sliding_window=8)
    assert [window for _, _, window in ops.calls[2:]] == [7]
    attend(torch.nn.Module(), q, k, v, None, layout=layout, scaling=SCALE, exact=True)
    attend(torch.nn.Module(), q, k, v, None, layout=layout, scaling=SCALE, dropout=1e-9)
    assert len(ops.calls) == 3
    monkeypatch.undo()
    torch.testing.assert_close(got, attend(torch.nn.Module(), q, k, v, None, layout=layout, scaling=SCALE)[0])


def test_a_cpu_has_no_kernels() -> None:
    assert ops_for(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)) is None
