"""A tokenizer is refused when it loads if the text that it is given does not come back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from real_openrlhf import train_warmup
from real_openrlhf.data.tokenizer import load_tokenizer, what_is_lost
from real_openrlhf.evaluate import main as evaluate
from real_openrlhf.judge.cli import main as judge
from real_openrlhf.train_real import main as train_real
from tests.helpers.tokenizers import word_tokenizer

ROOT = Path(__file__).parents[3]
TEXT = ["Rate this answer from 1 to 5 and end with the score 4"] * 20


def wrapped(inner: Tokenizer, unk: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token=unk)


def byte_level(*, decoder: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if decoder:
        inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(TEXT, trainer)
    return wrapped(inner)


def metaspace(scheme: str = "always", text: list[str] = TEXT) -> PreTrainedTokenizerFast:
    """As SentencePiece: a space in front, and here no token for a line break."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    inner.train_from_iterator(text, trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    return wrapped(inner, "<unk>")


def lower_case() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "</s>"]))
    return wrapped(inner, "[UNK]")


def quickstarts(words: list[str]) -> PreTrainedTokenizerFast:
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "examples/quickstart/make_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer: PreTrainedTokenizerFast = module.make_tokenizer(words)
    return tokenizer


def letters(known: str) -> PreTrainedTokenizerFast:
    """A token per letter."""
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", "</s>", *known])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return wrapped(inner, "<unk>")


LETTERS = "abcdefghijklmnopqrstuvwxyzR0123456789"


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(byte_level(), id="byte level"),
        pytest.param(metaspace("always"), id="SentencePiece, a leading space"),
        pytest.param(metaspace("never"), id="SentencePiece, none"),
        pytest.param(metaspace("always", ["评分 是 1 2 3 4 5"] * 9), id="SentencePiece of another script"),
        pytest.param(lower_case(), id="lower case"),
        pytest.param(word_tokenizer(), id="words and marks"),
        pytest.param(quickstarts(["fine", "score", "4"]), id="the quickstart's, most words unknown"),
        pytest.param(quickstarts(["gut"]), id="the quickstart's, all words unknown"),
        pytest.param(letters(LETTERS + " \n"), id="letters"),
    ],
)
def test_tokenizers_that_are_fine(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert what_is_lost(tokenizer) is None
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        pytest.param(letters(LETTERS), "spaces get lost", id="spaces are unknown"),
        pytest.param(byte_level(decoder=False), "words change", id="no decoder"),
    ],
)
def test_tokenizers_that_lose_their_text(tokenizer: PreTrainedTokenizerFast, says: str, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"--model '.*' ?: the tokenizer .* does not give its text back: {says}"):
        load_tokenizer(str(tmp_path), name="--model")


@pytest.fixture
def mislabelled(tmp_path: Path) -> Path:
    """A byte-level tokenizer that calls itself Llama's, which looks for other spaces."""
    folder = tmp_path / "mislabelled"
    byte_level().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    sizes = dict(vocab_size=400, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096, **sizes}))
    return folder


def test_a_wrong_class_beside_a_right_file_is_named(mislabelled: Path) -> None:
    with pytest.raises(ValueError, match=r'spaces get lost.*Ratethisanswer.*"tokenizer_class": "PreTrainedTokenizerF'):
        load_tokenizer(str(mislabelled))
    config = json.loads((mislabelled / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # as the message says
    (mislabelled / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(mislabelled))
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def command(name: str, model: Path, rows: Path) -> tuple[Any, list[str]]:
    out, scale = str(rows.parent / "out"), ["--scale", "1-5", "--anchor", "[RESULT] "]
    return {
        "train_real": (
            train_real,
            [
                *("--dry_run", "--actor.model_name_or_path", model, "--data.prompt_dataset", rows),
                *("--rollout.batch_size", "2", "--data.max_len", "600", "--rollout.max_new_tokens", "32"),
                *("--real.device", "cpu", "--real.anchor", "[RESULT] "),
            ],
        ),
        "train_warmup": (
            train_warmup.main,
            ["--dry_run", "--actor.model_name_or_path", model, "--data.prompt_dataset", rows, "--real.device", "cpu"],
        ),
        "evaluate": (evaluate, ["--model", model, "--benchmark", f"t={rows}", "--output_dir", out, *scale]),
        "judge": (judge, ["--model", model, "--input", rows, "--prompt_key", "prompt", *scale]),
    }[name]


@pytest.mark.parametrize("name", ["train_real", "train_warmup", "evaluate", "judge"])
def test_every_command_refuses(
    name: str, mislabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "Rate this", "response": "[RESULT] 1", "label": 1}) + "\n") * 64)
    main, words = command(name, mislabelled, rows)
    assert main([str(word) for word in words]) == 2
    assert "does not give its text back: spaces get lost" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
