"""Models of real sizes with random weights, made where they are used: a folder holds only config.json.

Nothing is downloaded or written to a disk: `make_weights_from_config` replaces the loading of weights in a contestant's
process by their initialisation on the device, with the same seed in all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0
OVERRIDE = "weights: random, of the model's own initialisation, made on the device from its config.json and one seed"
# AdamW under ZeRO-2 on one rank: weights, their fp32 copy, two moments, gradients, and the step's flat copies of them.
TRAINING_BYTES = 22


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape. depths: numbers of layers to measure if the whole model does not fit; () for the whole."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = True
    family: str = "qwen3"
    # Whether the full depth needs gradient checkpointing.
    gradient_checkpointing: bool = False

    def parameters(self, layers: int | None = None) -> int:
        """Weights of the matrices; norms are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + layer * (layers or self.layers)


SIZES = {
    "smollm2": Size(
        hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocabulary=49_152, family="llama"
    ),
    "1.7b": Size(hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=6144, vocabulary=151_936),
    "4b": Size(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocabulary=151_936),
    "8b": Size(
        hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=12288, vocabulary=151_936, tied=False,
        gradient_checkpointing=True,
    ),
    "32b": Size(
        hidden=5120, layers=64, heads=64, kv_heads=8, head_dim=128, intermediate=25600, vocabulary=151_936, tied=False,
        gradient_checkpointing=True,
    ),
    # For tests.
    "tiny": Size(hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=512),
}  # fmt: skip
NAMES = {
    "smollm2": "SmolLM2-135M", "1.7b": "Qwen3-1.7B", "4b": "Qwen3-4B", "8b": "Qwen3-8B", "32b": "Qwen3-32B",
    "tiny": "tiny",
}  # fmt: skip


def depths(size: Size, *, layers: int, total_bytes: int | None) -> list[int]:
    """Numbers of layers to measure: all of them, or N and 2 N, from which the whole depth is extrapolated.

    layers: N, or 0 for the largest N whose weights and optimizer take at most 60% of total_bytes; the rest is for the
    step.
    """
    if layers:
        return [size.layers] if layers >= size.layers else [layers, min(2 * layers, size.layers)]

    def fits(n: int) -> bool:
        return total_bytes is None or size.parameters(n) * TRAINING_BYTES <= 0.6 * total_bytes

    if fits(size.layers):
        return [size.layers]
    half = max((n for n in range(1, size.layers // 2 + 1) if fits(2 * n)), default=1)
    return [half, 2 * half]


def write_config(name: str, layers: int, folder: Path, *, positions: int = 4096) -> Path:
    """Write a folder with only config.json."""
    size = SIZES[name]
    config: dict[str, Any] = {
        "model_type": size.family,
        "architectures": ["LlamaForCausalLM" if size.family == "llama" else "Qwen3ForCausalLM"],
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": positions,
        "tie_word_embeddings": size.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def make_weights_from_config(device: Any) -> None:
    """From now on, from_pretrained in this process initialises weights on a torch device instead of loading them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def load(path: str, **options: Any) -> Any:
        dtype = options.get("dtype") or options.get("torch_dtype")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        torch.manual_seed(SEED)
        attention = options.get("attn_implementation")
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )

    # Liger's class calls it through super().
    AutoModelForCausalLM.from_pretrained = staticmethod(load)
