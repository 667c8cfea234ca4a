"""The operations of a step, by hand, by counting a mask, and against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from examples.benchmark.flops import Shape, executed, needed, needed_pairs, needed_tokens, rows
from examples.benchmark.gemm import measure, rate
from examples.benchmark.protocol import Case
from real_openrlhf.common.device import Device

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MADE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    # Heads wider than hidden / heads, as Qwen3's are.
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, attn_implementation="eager")),
}


def case(prompt: int, response: int, samples: int, **more: bool) -> Case:
    return Case(prompt=prompt, response=response, samples=samples, micro_batch=1, **more)


def test_a_step_by_hand() -> None:
    shape = Shape(vocabulary=10, hidden=4, intermediate=6, layers=1, heads=2, kv_heads=1, head_dim=2)
    step = case(3, 2, 2)
    # Per token: query and output 2 * 4 * 4 each, key and value 2 * 4 * 2 each, three linears 2 * 4 * 6 each.
    per_token = 2 * 32 + 2 * 16 + 3 * 48
    # Prompt 1 + 2 + 3; each rollout 4 + 5. Two products of 2 * (2 heads * 2 dimensions) per pair.
    pairs = 6 + 2 * 9
    logits = 4  # rows of 2 * 4 * 10
    assert needed_tokens(step) == 7 and rows(step) == 10 and needed_pairs(step) == pairs
    assert needed(shape, step) == 3 * (7 * per_token + pairs * 16 + logits * 80)


@pytest.mark.parametrize(("prompt", "response", "samples"), [(1, 1, 1), (5, 3, 4), (7, 1, 2)])
def test_pairs_are_those_of_the_mask(prompt: int, response: int, samples: int) -> None:
    owner = torch.cat(
        [torch.zeros(prompt, dtype=torch.int64), torch.arange(1, samples + 1).repeat_interleave(response)]
    )
    sees = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    assert needed_pairs(case(prompt, response, samples)) == int(sees.tril().sum())


@pytest.mark.parametrize("family", sorted(MADE))
def test_forward_and_backward_are_what_torch_counts(family: str, tmp_path) -> None:
    model = MADE[family]()
    model.config.save_pretrained(tmp_path)
    shape = Shape.of(tmp_path)
    tokens = torch.randint(0, 50, (1, 11))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens, logits_to_keep=4).logits
    # The eager kernel multiplies all pairs, also those that the mask hides.
    forward = shape.forward(tokens=11, pairs=11 * 11, logits=4)
    rotary = 2 * (shape.head_dim // 2) * 11  # frequencies times positions, which have no gradient
    assert counter.get_total_flops() == forward + rotary
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_what_contestants_compute() -> None:
    shape = Shape(vocabulary=1000, hidden=8, intermediate=16, layers=2, heads=2, kv_heads=2, head_dim=4)
    step = case(16, 4, 8)
    plain = shape.forward(tokens=160, pairs=8 * 210, logits=160)
    assert executed(shape, "real", step) == needed(shape, step)
    assert executed(shape, "openrlhf", step) == 4 * plain and executed(shape, "authors", step) == 5 * plain
    again = replace(step, gradient_checkpointing=True)
    assert executed(shape, "real", again) * 3 == needed(shape, step) * 4
    assert executed(shape, "openrlhf", again) == 5 * plain


def test_gemm_rate_weighs_products_by_their_number() -> None:
    seconds = {(2, 3): 1.0, (4, 5): 2.0}
    found = rate([(2, 3, 3), (4, 5, 1)], lambda inputs, outputs: seconds[inputs, outputs], rows=10)
    assert found == (3 * 2 * 10 * 6 + 2 * 10 * 20) / (3 * 1.0 + 2.0)


def test_gemm_runs_the_models_shapes() -> None:
    shape = Shape(vocabulary=64, hidden=8, intermediate=16, layers=1, heads=2, kv_heads=1, head_dim=4)
    found = measure(shape, Device.resolve("cpu"), rows=16, repeats=2)
    assert found["flops_per_second"] > 0 and found["dtype"] == "fp32" and found["rows"] == 16
