"""What of a model memory and time depend on: its parameters, counted without weights, and the sizes of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from real_openrlhf.config.schema import LoraConfig

# Parameters without weight decay have a group of their own, as openrlhf.utils.deepspeed.deepspeed_utils makes them.
_NO_DECAY = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")
# DeepSpeed's ZeRO 1 and 2 pad a group to a multiple of this many elements per rank (nccl_start_alignment_factor).
_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder with gated feed-forward layers (Llama, Mistral, Qwen2, Qwen3, Gemma families)."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, path: str | Path) -> DecoderShape:
        """From a Hugging Face folder's config.json. AttributeError for a model of another kind."""
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False).get_text_config()
        heads = config.num_attention_heads
        return cls(
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Of the keys, and as much again of the values."""
        return self.kv_heads * self.head_dim

    def linears(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how many in the whole model) of the linear layers, without the output layer."""
        return [
            (self.hidden, self.query_width, self.layers),
            (self.hidden, self.key_width, 2 * self.layers),
            (self.query_width, self.hidden, self.layers),
            (self.hidden, self.intermediate, 2 * self.layers),
            (self.intermediate, self.hidden, self.layers),
        ]

    def forward(self, *, tokens: int, pairs: int, logits: int) -> int:
        """Operations of a forward pass over `tokens`; pairs: of a query and a key that it sees; logits: rows of them.

        A multiplication and an addition are two. Matrix products alone are counted.
        """
        per_token = sum(2 * inputs * outputs * count for inputs, outputs, count in self.linears())
        per_pair = 2 * 2 * self.query_width * self.layers
        return per_token * tokens + per_pair * pairs + 2 * self.hidden * self.vocabulary * logits


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Parameters are counted on the model itself, made of nothing but shapes.

    parameters       all, a tied head once, adapters not among them
    frozen           sizes of the parameters that are not trained: none without adapters
    largest_layer    of a decoder layer
    largest_tensor   of a single parameter: the embedding, as a rule
    decayed, other   sizes of the parameters that are trained, with weight decay and without: DeepSpeed's two groups
    decoder          None: layers of another kind, whose activations and operations nothing is said of
    head_norms       queries and keys have norms of their own
    norms            of a decoder layer, besides those
    """

    parameters: int
    largest_layer: int
    largest_tensor: int
    frozen: tuple[int, ...]
    decayed: tuple[int, ...]
    other: tuple[int, ...]
    decoder: DecoderShape | None
    head_norms: bool
    norms: int

    @property
    def trained(self) -> int:
        """Parameters that are trained: all, or the adapters'."""
        return sum(self.decayed) + sum(self.other)

    @property
    def whole(self) -> int:
        """Parameters of the policy, adapters among them."""
        return self.trained + sum(self.frozen)

    def share(self, ranks: int) -> int:
        """Elements of all parameters that a rank holds under ZeRO 3, padding and all."""
        return sum(ceil(size / ranks) for size in (*self.frozen, *self.decayed, *self.other))

    def partition(self, zero_stage: int, ranks: int) -> int:
        """Elements of the trained parameters whose optimizer states a rank holds, padding and all."""
        if zero_stage == 0:
            return self.trained
        if zero_stage == 3:  # every parameter is divided by itself
            return sum(ceil(size / ranks) for size in (*self.decayed, *self.other))
        step = _ALIGNMENT * ranks
        return sum(ceil(sum(group) / step) * step // ranks for group in (self.decayed, self.other))

    @classmethod
    def of(cls, path: str, lora: LoraConfig = LoraConfig()) -> ModelShape | None:  # noqa: B008 (frozen)
        """By the model's config, no weights read; None if that is not known here."""
        return _shape(str(path), lora)


@lru_cache(maxsize=8)
def _shape(path: str, lora: LoraConfig) -> ModelShape | None:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None  # what is wrong with it, the policy's own loading says
    parameters = _count(network.parameters())
    layer = _decoder_layer(network)
    decoder = _decoder(path, layer)
    names = [name for name, _ in layer.named_modules()] if layer is not None else []
    norms = [name for name in names if "norm" in name.lower()]
    head_norms = [name for name in norms if name.rpartition(".")[0]]
    if lora.rank:
        from real_openrlhf.actors.policy.lora import add_adapters

        add_adapters(network, lora, seed=0)
    trained = [(name, p.numel()) for name, p in network.named_parameters() if p.requires_grad]
    return ModelShape(
        parameters=parameters,
        largest_layer=0 if layer is None else _count(layer.parameters()),
        largest_tensor=max(p.numel() for p in network.parameters()),
        frozen=tuple(p.numel() for p in network.parameters() if not p.requires_grad),
        decayed=tuple(size for name, size in trained if not any(part in name for part in _NO_DECAY)),
        other=tuple(size for name, size in trained if any(part in name for part in _NO_DECAY)),
        decoder=decoder,
        head_norms=bool(head_norms),
        norms=len(norms) - len(head_norms),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _decoder_layer(network: Any) -> nn.Module | None:
    """The largest module of the longest list of modules."""
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    longest: list[nn.Module] = max(lists, key=len, default=[])
    return max(longest, key=lambda layer: _count(layer.parameters()), default=None)


def _decoder(path: str, layer: nn.Module | None) -> DecoderShape | None:
    """Only where the layer's own linear layers are the ones that a `DecoderShape` speaks of."""
    if layer is None:
        return None
    try:
        shape = DecoderShape.of(path)
    except (AttributeError, TypeError):  # sizes under other names, or none
        return None
    wanted = sorted(
        (inputs, outputs) for inputs, outputs, count in shape.linears() for _ in range(count // shape.layers)
    )
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    found = sorted((linear.in_features, linear.out_features) for linear in linears)
    beside = _count(layer.parameters()) - _count(p for linear in linears for p in linear.parameters())
    # What is left are norms, of which a layer has a few vectors.
    return shape if found == wanted and beside < 8 * shape.hidden + 2 * shape.head_dim + 1 else None
