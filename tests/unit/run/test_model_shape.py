"""Parameters by closed forms of the families, published counts, and DeepSpeed's own estimators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, MixtralConfig

from real_openrlhf.config.schema import LoraConfig
from real_openrlhf.run.model_shape import ModelShape
from tests.helpers.configs import FAMILIES, QWEN3_32B, SMALL, write_config


def shape_of(folder: Path, family: str, lora: LoraConfig = LoraConfig(), **sizes: Any) -> ModelShape:  # noqa: B008
    shape = ModelShape.of(write_config(folder, family, **sizes), lora)
    assert shape is not None
    return shape


def layer_of(family: str, *, hidden: int, intermediate: int, query: int, key: int, head_dim: int) -> int:
    linears = hidden * query + 2 * hidden * key + query * hidden + 3 * hidden * intermediate
    biases = query + 2 * key if family == "qwen2" else 0
    head_norms = 2 * head_dim if family == "qwen3" else 0
    return linears + biases + head_norms + 2 * hidden


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameters_by_the_families_closed_forms(family: str, tied: bool, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, family, **SMALL, head_dim=16, tie_word_embeddings=tied)
    layer = layer_of(family, hidden=24, intermediate=40, query=64, key=32, head_dim=16)
    assert shape.largest_layer == layer and shape.largest_tensor == 97 * 24
    assert shape.parameters == shape.trained == shape.whole == 97 * 24 * (1 if tied else 2) + 3 * layer + 24
    assert shape.decoder is not None and shape.decoder.query_width == 64
    assert (shape.head_norms, shape.norms) == (family == "qwen3", 2)
    # Without weight decay: norms and biases.
    biases = 3 * (64 + 2 * 32) if family == "qwen2" else 0
    assert sum(shape.other) == (6 + 1) * 24 + biases + (3 * 2 * 16 if family == "qwen3" else 0)


def test_qwen3_32b_has_the_published_number(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "qwen3", **QWEN3_32B)
    layer = layer_of("qwen3", hidden=5120, intermediate=25_600, query=8192, key=1024, head_dim=128)
    assert shape.parameters == 2 * 151_936 * 5120 + 64 * layer + 5120
    # Its page says 32.8 billion, and 31.2 without the embeddings.
    assert round(shape.parameters / 1e9, 1) == 32.8
    assert round((shape.parameters - 2 * 151_936 * 5120) / 1e9, 1) == 31.2


@pytest.mark.parametrize("make", [GPT2Config, MixtralConfig])
def test_layers_of_another_kind_are_only_counted(make: Any, tmp_path: Path) -> None:
    make(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path)
    shape = ModelShape.of(str(tmp_path))
    assert shape is not None and shape.parameters > 0 and shape.decoder is None


def test_a_model_without_a_config_is_not_known(tmp_path: Path) -> None:
    assert ModelShape.of(str(tmp_path)) is None


def test_adapters_are_trained_and_nothing_else(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, "llama", LoraConfig(rank=3), **SMALL)
    # A [r, in] and B [out, r] beside seven linear layers; heads of 6.
    pairs = [(24, 24), (24, 12), (24, 12), (24, 24), (24, 40), (24, 40), (40, 24)]
    assert shape.trained == 3 * 3 * sum(inputs + outputs for inputs, outputs in pairs)
    assert sum(shape.frozen) == shape.parameters == shape.whole - shape.trained


def test_shares_are_padded_as_deepspeed_pads_them() -> None:
    shape = ModelShape(
        parameters=26,
        largest_layer=0,
        largest_tensor=11,
        frozen=(5,),
        decayed=(11, 7),
        other=(3,),
        decoder=None,
        head_norms=False,
        norms=2,
    )
    assert shape.partition(0, 4) == 21
    # Groups of 18 and 3, padded to multiples of 2 * 4: 24 and 8, of which a rank has a fourth.
    assert shape.partition(1, 4) == shape.partition(2, 4) == 6 + 2
    # Every parameter by itself: 3 + 2 + 1, and of the frozen 2.
    assert shape.partition(3, 4) == 6 and shape.share(4) == 8
