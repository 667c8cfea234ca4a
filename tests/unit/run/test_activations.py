"""The formulas against the tensors that autograd saves, and against peaks measured on an H100."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from real_openrlhf.actors.policy.model import accept_packed_rows
from real_openrlhf.algo.batch import pack
from real_openrlhf.config.schema import Config
from real_openrlhf.run.activations import PackedRow, activations, kept_per_token, output_layer
from real_openrlhf.run.memory import POLICY_CONTEXT, Question, memory_plan
from real_openrlhf.run.model_shape import DecoderShape, ModelShape
from tests.helpers.configs import FAMILIES, SMALL, write_config
from tests.unit.config.test_validate import config_with

MODELS: dict[str, Any] = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
RESULTS = Path(__file__).parents[3] / "tests" / "gpu" / "results" / "h100"
GIB = 2**30


def packed_body(network: Any, prompt: int, responses: int, length: int) -> tuple[Any, int]:
    """The layers' forward pass over a packed row, and its tokens; the output layer is left out."""
    accept_packed_rows(network)
    tokens = torch.randint(3, 97, (prompt + responses * length,))
    packed = pack([(tokens[:prompt], list(tokens[prompt:].split(length)))])

    def forward() -> torch.Tensor:
        output = network.model(
            input_ids=packed.token_ids[None],
            position_ids=packed.position_ids[None],
            use_cache=False,
            layout=packed.layout,
            exact=False,
        )
        return output.last_hidden_state

    return forward, len(tokens)


def saved_bytes(forward: Any, network: nn.Module) -> int:
    """Of the storages that autograd keeps, each once, parameters not among them."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_autograd_saves_what_the_formula_says(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "num_hidden_layers": 4}
    shape = ModelShape.of(write_config(tmp_path, family, **sizes))
    assert shape is not None
    config = FAMILIES[family](**sizes, attn_implementation="sdpa")
    network = MODELS[family](config).to(dtype)
    forward, tokens = packed_body(network, prompt=96, responses=6, length=48)
    wanted = 4 * tokens * kept_per_token(shape, itemsize=dtype.itemsize, liger=False)
    # Embedding, last norm, cosines and sines of the positions come on top, once.
    assert 1.0 <= saved_bytes(forward, network) / wanted < 1.1


def test_checkpointing_saves_the_layers_inputs(tmp_path: Path) -> None:
    sizes = {**SMALL, "hidden_size": 64, "num_hidden_layers": 12}
    shape = ModelShape.of(write_config(tmp_path, "llama", **sizes))
    assert shape is not None
    network = LlamaForCausalLM(FAMILIES["llama"](**sizes, attn_implementation="sdpa"))
    network.train()
    network.gradient_checkpointing_enable({"use_reentrant": False})
    forward, tokens = packed_body(network, prompt=96, responses=6, length=48)
    config = config_with({"actor.gradient_checkpointing_enable": True})
    row = PackedRow(tokens=tokens, logits=0)
    found = activations(config, shape, row, itemsize=4, liger=False, logit_bytes=GIB)
    assert found is not None
    assert 0.9 < saved_bytes(forward, network) / found.kept < 1.2


# -- one H100 -----------------------------------------------------------------------------------------------------

# Qwen3-1.7B's shape, as tests/gpu/step.py has it.
H100 = DecoderShape(vocabulary=151_936, hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, head_dim=128)


def measured(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["figures"]
    return figures


@pytest.mark.parametrize(
    ("name", "checkpointing", "liger"),
    [("1.7b", False, False), ("1.7b with liger", False, True), ("1.7b, checkpointing", True, False)],
)
def test_the_h100s_peak_of_a_step(name: str, checkpointing: bool, liger: bool) -> None:
    """A prompt of 2,048 tokens and 16 rollouts of 512; logits had 4 GiB then (tests/gpu/README.md)."""
    shape = ModelShape(
        parameters=0,
        largest_layer=0,
        largest_tensor=0,
        frozen=(),
        decayed=(),
        other=(),
        decoder=H100,
        head_norms=True,
        norms=2,
    )
    config = config_with({"actor.gradient_checkpointing_enable": checkpointing})
    row = PackedRow(tokens=2048 + 16 * 512, logits=16 * 512)
    found = activations(config, shape, row, itemsize=2, liger=liger, logit_bytes=4 * GIB)
    assert found is not None
    peak = found.kept + max(found.forward, found.backward, found.layer)
    assert peak / GIB == pytest.approx(measured("step")[f"{name}: peak GiB above weights"], rel=0.03)


@pytest.mark.parametrize("megabytes", [1024, 4096, 16384])
def test_the_h100s_peak_of_the_output_layer(megabytes: int) -> None:
    found = max(output_layer(H100, 8192, itemsize=2, logit_bytes=megabytes * 2**20, trained=True))
    peak = measured("head")[f"8192 rows, {megabytes} MB: ms, needed TFLOP/s, peak GiB"][2]
    assert found / GIB == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(("micro", "name"), [(16, "one micro-batch"), (1, "micro-batches of 1, fp32")])
def test_the_h100s_peak_of_an_update(micro: int, name: str, tmp_path: Path) -> None:
    """Qwen3-0.6B's shape under ZeRO 2 on one rank, as tests/gpu/update.py has it, by torch's allocator.

    Transformers' layers and 4 GiB for logits, as in the first test.
    """
    sizes = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, vocab_size=151_936, head_dim=128)
    heads = dict(num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)
    shape = ModelShape.of(write_config(tmp_path, "qwen3", **sizes, **heads))
    assert shape is not None
    config = config_with(
        {
            "rollout.batch_size": 1,
            "rollout.max_new_tokens": 256,
            "train.micro_batch_size": micro,
            "train.max_tokens_per_gpu": 2**20,
            "real.logits_mb": 4096,
        }
    )
    plan = memory_plan(config, Question(shape=shape, itemsize=2, card=80 * GIB, prompt=1024, liger=False))
    peak = max(phase.total for phase in plan.places[0].phases if phase.name != "sync") - POLICY_CONTEXT
    log = (RESULTS / "log_policy.txt").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^  {name}: peak GiB: (.*)$", log, flags=re.MULTILINE)
    # Without checkpointing, activations go while the buffers of gradients fill.
    assert 1.0 <= peak / GIB / float(found) < 1.06


# -- the longest row ----------------------------------------------------------------------------------------------


def row_of(prompt: int, **changes: Any) -> PackedRow:
    config: Config = config_with({name.replace("__", "."): value for name, value in changes.items()})
    return PackedRow.of(config, prompt)


def test_the_longest_row() -> None:
    # 16 rollouts of 1,024 behind one prompt.
    assert row_of(2000, train__max_tokens_per_gpu=20_000) == PackedRow(tokens=2000 + 16_384, logits=16_384)
    # No more tokens than a pass may have; the prompt's need no logits.
    assert row_of(2000, train__max_tokens_per_gpu=8192) == PackedRow(tokens=8192, logits=6192)
    assert row_of(2000, train__micro_batch_size=4) == PackedRow(tokens=2000 + 4096, logits=4096)
    # Rollouts of two prompts.
    two = row_of(100, train__micro_batch_size=32, train__max_tokens_per_gpu=50_000)
    assert two == PackedRow(tokens=200 + 32 * 1024, logits=32 * 1024)
    # The only row of an update.
    assert not row_of(100).last and row_of(100, rollout__batch_size=1, train__max_tokens_per_gpu=20_000).last


def test_chunks_of_logits_by_hand() -> None:
    """A vocabulary of 8 and rows of 32 bytes: a chunk of 2 rows, of which half of the bound holds four."""
    decoder = replace(H100, vocabulary=8, hidden=1)

    def forward(rows: int) -> int:
        return output_layer(decoder, rows, itemsize=2, logit_bytes=512, trained=False)[0] - 2 * rows

    # Logits and their log-softmax; then those of the chunk before, whose probabilities are kept.
    assert forward(1) == 2 * 32 and forward(2) == 2 * 64
    assert forward(4) == 64 + 64 + 2 * 64 and forward(8) == 3 * 64 + 64 + 2 * 64
    # From the sixth on the chunk before was not kept.
    assert forward(10) == 4 * 64 + 64 + 2 * 64 and forward(100) == 4 * 64 + 2 * 64 + 2 * 64
