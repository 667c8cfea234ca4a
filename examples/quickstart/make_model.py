"""A tiny Qwen3 model with random weights and a word-level tokenizer, for the synthetic tasks.

python examples/quickstart/make_model.py --words runs/quickstart/data/words.txt --output_dir runs/quickstart/init
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def read_words(path: Path) -> list[str]:
    """One word per line. ValueError, naming --words, the file and the line, for a word that cannot be one token."""
    words: dict[str, int] = {}
    if not path.is_file():
        raise ValueError(f"--words {path}: there is no such file; task.py writes words.txt next to the data")
    for number, word in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"--words {path}, line {number}"
        if word.split() != [word]:
            raise ValueError(f"{where}: {word!r} is not one word; every line holds one, without spaces")
        if word in (PAD, EOS, UNK):
            raise ValueError(f"{where}: {word} is the tokenizer's own; use another word")
        if word in words:
            raise ValueError(f"{where}: {word!r} is in line {words[word]} already; every word may occur once")
        words[word] = number
    if not words:
        raise ValueError(f"--words {path}: the file is empty; every line holds one word")
    return list(words)


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word; words are split at white space and joined by single spaces."""
    vocab = {word: i for i, word in enumerate([PAD, EOS, UNK, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=256
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, layers: int, hidden: int) -> Qwen3ForCausalLM:
    """A model with heads of 32 dimensions, the smallest that vLLM's CPU attention supports."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=256,
        # Small models learn faster from larger weights than the library's 0.02.
        initializer_range=hidden**-0.5 / 1.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random model and its tokenizer.")
    parser.add_argument("--words", type=Path, required=True, help="file with one word a line, as task.py writes it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    args = parser.parse_args()
    try:
        words = read_words(args.words)
    except ValueError as error:
        parser.error(str(error))
    tokenizer = make_tokenizer(words)
    model = make_model(tokenizer, seed=args.seed, layers=args.layers, hidden=args.hidden)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
