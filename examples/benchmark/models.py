"""The benchmark's synthetic models: narrow, with a large vocabulary, random weights and a tied head.

    python -m examples.benchmark.models --name narrow --output_dir runs/benchmark/models/narrow

The vocabulary has the size of that of Qwen's models, so that logits are as wide as in practice while the rest of the
step stays cheap. A finished folder is reused.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

WORDS = ("<pad>", "</s>", "<unk>", *(str(digit) for digit in range(10)), "So", "the", "overall", "score", "is")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Heads have 32 dimensions: the smallest that vLLM's CPU attention knows."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SPECS = {
    "narrow": Spec(vocabulary=151_936, hidden=128, intermediate=384, layers=4, heads=4, kv_heads=2),
    # For tests: seconds per step on any machine.
    "tiny": Spec(vocabulary=4_096, hidden=64, intermediate=192, layers=2, heads=2, kv_heads=1),
}


def make(name: str, output_dir: Path, *, seed: int = 0) -> None:
    """A Hugging Face folder with a Qwen3 model and a word-level tokenizer. Raises KeyError for an unknown name."""
    spec = SPECS[name]
    if (output_dir / "model.safetensors").is_file() and (output_dir / "tokenizer.json").is_file():
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = [*WORDS, *(f"w{i}" for i in range(spec.vocabulary - len(WORDS)))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=sorted(SPECS), required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.name, args.output_dir, seed=args.seed)


if __name__ == "__main__":
    main()
