"""Flags of a run whose files are there, and no cluster to join."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from tests.helpers.tiny_judge import make_rows, make_tokenizer, write_rows


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2).save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", make_rows(40, seed=0))
    write_rows(folder / "test.jsonl", make_rows(6, seed=1))
    named = {
        "actor.model_name_or_path": folder / "model",
        "data.prompt_dataset": folder / "train.jsonl",
        "eval.dataset": folder / "test.jsonl",
        "ckpt.output_dir": folder / "out",
        "real.anchor": "score ",
        "real.device": "cpu",
        "data.max_len": 32,
        "rollout.max_new_tokens": 8,
        "rollout.batch_size": 8,
        "rollout.n_samples_per_prompt": 4,
    }
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]
