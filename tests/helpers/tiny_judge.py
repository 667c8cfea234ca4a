"""A tiny judge that writes a word or two and a score: a model, its tokenizer and its data, in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD, BAD = ["fine", "sound", "clear"], ["vague", "wrong", "rude"]
WORDS = [*GOOD, *BAD, "judge", "because", "score", *"12345"]
ANCHOR = "score "


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def make_rows(n: int, seed: int) -> list[dict[str, object]]:
    """Prompts of 3 to 8 words; the label is 3 + good words - bad words, cut to 1..5."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        words = [rng.choice(GOOD + BAD) for _ in range(rng.randint(3, 8))]
        tally = sum(1 if w in GOOD else -1 for w in words)
        rows.append({"prompt": " ".join([*words, "judge"]), "label": min(5, max(1, 3 + tally))})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_judge(folder: Path, *, tied: bool = True, steps: int = 150, seed: int = 0) -> Path:
    """Train a 2-layer Llama to answer "because <word> score <roughly the label>" and save it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = make_rows(512, seed=seed + 1)
    for _ in range(steps):
        texts = []
        for row in rng.sample(rows, 32):
            words = str(row["prompt"]).split()[:-1]
            said = [rng.choice(words) for _ in range(rng.randint(1, 2))]
            score = min(5, max(1, int(row["label"]) + rng.choice([-1, 0, 0, 1])))  # type: ignore[call-overload]
            texts.append(f"{row['prompt']} because {' '.join(said)} score {score} </s>")
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
