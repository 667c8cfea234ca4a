"""flash-attn's stand-in, through flash_attn, transformers and OpenRLHF, against separate rows in fp32."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from examples.benchmark import flash_shim
from real_openrlhf.common.device import flash_attn_available
from tests.helpers.varlen_ops import PlainOps

NAMES = ("fwd", "bwd", "varlen_fwd", "varlen_bwd")


@pytest.fixture
def kernels() -> Iterator[PlainOps]:
    """flash_attn on plain torch in place of the operators; its custom operators are registered for the CPU too."""
    interface: Any = importlib.import_module("flash_attn.flash_attn_interface")
    stand_in: Any = importlib.import_module("flash_attn_2_cuda")
    if hasattr(stand_in, "varlen_fwd"):
        pytest.skip("flash-attn's own kernels are here")
    ops = PlainOps()
    assert flash_shim.install(ops)
    for name in (
        "_flash_attn_forward",
        "_flash_attn_backward",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
    ):
        operator = getattr(interface, name)
        operator.register_kernel("cpu")(operator._init_fn)
    yield ops
    for name in NAMES:
        delattr(stand_in, name)


def random_rows(lengths: list[int], heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(sum(lengths), heads, 16, generator=generator, requires_grad=True)


def separate(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Each row by torch's attention."""
    rows = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v))):
        query, key, value = (p.transpose(0, 1)[None] for p in parts)
        rows.append(scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(rows)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), inputs)


def test_packed_rows(kernels: PlainOps) -> None:
    from flash_attn import flash_attn_varlen_func

    lengths = [5, 1, 9]
    inputs = [random_rows(lengths, heads) for heads in (4, 2, 2)]
    ends = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    out = flash_attn_varlen_func(*inputs, ends, ends, 9, 9, causal=True)
    wanted = separate(*inputs, lengths)
    torch.testing.assert_close(out, wanted)
    for got, want in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert len(kernels.calls) == 1


def test_a_batch_of_whole_rows(kernels: PlainOps) -> None:
    from flash_attn import flash_attn_func

    inputs = [random_rows([7, 7], heads) for heads in (4, 2, 2)]
    out = flash_attn_func(*(x.view(2, 7, -1, 16) for x in inputs), causal=True)
    wanted = separate(*inputs, [7, 7]).view(2, 7, 4, 16)
    torch.testing.assert_close(out, wanted)
    for got, want in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"dropout_p": 0.1}, {"window_size": (3, 0)}, {"softcap": 2.0}])
def test_options_are_refused(kernels: PlainOps, options: dict[str, Any]) -> None:
    from flash_attn import flash_attn_func

    x = torch.zeros(1, 4, 2, 16)
    with pytest.raises(NotImplementedError):
        flash_attn_func(x, x, x, causal=True, **options)


def test_real_kernels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = importlib.import_module("flash_attn_2_cuda")
    monkeypatch.setattr(stand_in, "varlen_fwd", "theirs", raising=False)
    assert flash_attn_available() and not flash_shim.install()
    assert stand_in.varlen_fwd == "theirs" and not hasattr(stand_in, "varlen_bwd")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_openrlhfs_packed_actor(
    kernels: PlainOps, monkeypatch: pytest.MonkeyPatch, rows: int, checkpointing: bool
) -> None:
    """Log-probs and gradients of OpenRLHF's Actor with packing are those of its separate rows without."""
    import sys

    from openrlhf.models import Actor
    from transformers import Qwen3Config, Qwen3ForCausalLM, modeling_flash_attention_utils

    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setitem(sys.modules, "flash_attn.ops.triton.cross_entropy", None)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16, vocab_size=60)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=True))
    actor = Actor(model, packing_samples=False)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(2, 60, (rows, 11))
    mask = torch.ones_like(ids)
    mask[1:, 8:] = 0
    action_mask = mask[:, 1:].bool().clone()
    action_mask[:, :4] = False

    def run(packing: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        actor.packing_samples = packing
        model.config._attn_implementation = "flash_attention_2" if packing else "sdpa"
        logprobs = actor(ids, action_mask, attention_mask=mask)
        weights = torch.linspace(0.5, 1.5, logprobs.numel()).view(logprobs.shape)
        return logprobs.detach(), torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))

    packed, wanted = run(True), run(False)
    # Two layers, once each; checkpointing computes them again.
    assert len(kernels.calls) == (4 if checkpointing else 2)
    torch.testing.assert_close(packed[0], wanted[0], atol=1e-5, rtol=1e-4)
    for got, want in zip(packed[1], wanted[1]):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
