"""The policy's side of the agreement check: sequences of several lengths in one forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from real_openrlhf.actors.policy.policy_actor import end_at, padded_logprobs
from tests.unit.actors.policy.test_model import MODELS, VOCABULARY, make_model

CPU = torch.device("cpu")
LENGTHS = (9, 2, 14, 5)


def random_sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_padding_changes_nothing(kind: str, attention: str) -> None:
    model = make_model(kind, attention).eval()
    sequences = random_sequences()
    found = padded_logprobs(model, sequences, CPU)
    assert [len(values) for values in found] == [n - 1 for n in LENGTHS]
    for ids, values in zip(sequences, found, strict=True):
        alone = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        exact = torch.stack([alone[t, token] for t, token in enumerate(ids[1:])])
        torch.testing.assert_close(values.double(), exact, rtol=0, atol=1e-5)
        assert values.dtype == torch.float32 and not values.requires_grad


@torch.no_grad()
def test_one_forward_unless_the_logits_would_be_too_many() -> None:
    model = make_model("qwen3").eval()
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    whole = padded_logprobs(model, random_sequences(), CPU)
    assert calls == [(4, 14)]
    parts = padded_logprobs(model, random_sequences(), CPU, max_tokens=30)
    assert calls[1:] == [(2, 9), (2, 14)]
    padded_logprobs(model, random_sequences(), CPU, max_tokens=1)
    assert len(calls) == 3 + 4
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert padded_logprobs(model, [], CPU) == []


@torch.no_grad()
def test_logits_in_bf16_are_normalised_in_fp32() -> None:
    model = make_model("llama_untied").to(torch.bfloat16).eval()
    for values in padded_logprobs(model, random_sequences(), CPU):
        assert values.dtype == torch.float32
        assert not values.equal(values.bfloat16().float())  # a softmax in bf16 would have rounded them


@pytest.mark.parametrize(("known", "ends"), [(None, 1), (1, 1), (9, [1, 9]), ([9, 1], [9, 1]), ([9, 8], [1, 9, 8])])
def test_a_saved_model_ends_at_the_tokenizers_end_too(known: int | list[int] | None, ends: int | list[int]) -> None:
    generation = SimpleNamespace(eos_token_id=known)
    end_at(generation, 1)
    assert generation.eos_token_id == ends
    end_at(generation, None)
    assert generation.eos_token_id == ends
