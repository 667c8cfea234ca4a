from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.quickstart.warmup import (
    METRICS_FILE,
    Example,
    WarmupConfig,
    WarmupError,
    batches,
    encode_response,
    load_examples,
    main,
    save,
    summed_loss,
    train,
)
from real_openrlhf.data.row import DataError
from real_openrlhf.data.template import PromptTemplate

WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "d", "score", "1", "2", "3"]
CPU = torch.device("cpu")
ROWS = [
    {"prompt": "a b", "response": "c score 1"},
    {"prompt": "b a a", "response": "d c score 2"},
    {"prompt": "c", "response": "score 3"},
    {"prompt": "d d a b", "response": "a score 2"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "sft.jsonl", ROWS)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, max_len: int = 64) -> list[Example]:
    return load_examples(str(path), tokenizer=tokenizer, template=PromptTemplate(), max_len=max_len)


def test_ids_are_the_prompts_then_the_responses_then_one_end_of_text(data, tokenizer):
    first = load(data, tokenizer)[0]
    assert first.token_ids == (3, 4, 5, 7, 8, 1)
    assert first.n_prompt == 2 and first.n_learned == 4
    assert encode_response(tokenizer, "score 1 </s>") == [7, 8, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"line 2, column 'response': no such column; .*prompt"),
        ({"promt": "a", "response": "b"}, r"line 2, column 'prompt': .*did you mean 'promt'"),
        ({"prompt": "a", "response": " "}, r"line 2, column 'response': a response is text"),
        ({"prompt": "a", "response": 4}, r"line 2, column 'response': a response is text, not 4"),
        ({"prompt": "a", "response": "zebra"}, r"line 2, column 'response': the tokenizer has no token for a part of"),
        ({"prompt": "a", "response": "b " * 80}, r"line 2: .*82 tokens; raise --max_len 64"),
        (["a"], r"line 2: a row must be an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "bad.jsonl", [ROWS[0], row]), tokenizer)


def test_a_tokenizer_without_an_end_is_refused(data, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(WarmupError, match="eos_token"):
        load(data, tokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "exactly one of --max_steps and --num_epochs"),
        ({"max_steps": 1, "num_epochs": 1.0}, "exactly one"),
        ({"max_steps": 0}, "--max_steps must be positive"),
        ({"max_steps": 1, "learning_rate": float("nan")}, "--learning_rate must be positive"),
        ({"max_steps": 1, "micro_batch_size": -1}, "--micro_batch_size must be positive"),
        ({"max_steps": 1, "warmup_steps": -1}, "--warmup_steps must not be negative"),
        ({"max_steps": 1, "lr_scheduler": "linear"}, "cosine or constant, got 'linear'"),
    ],
)
def test_contradictory_or_impossible_flags_are_refused(flags, message):
    with pytest.raises(WarmupError, match=message):
        WarmupConfig(**flags)


def test_learning_rate_rises_then_falls():
    config = WarmupConfig(learning_rate=8.0, max_steps=10, warmup_steps=4)
    assert [config.learning_rate_at(step, 10) for step in range(5)] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert config.learning_rate_at(7, 10) == pytest.approx(4.0)  # half way down
    assert config.learning_rate_at(9, 10) == pytest.approx(4.0 * (1 + math.cos(5 * math.pi / 6)))
    constant = WarmupConfig(learning_rate=8.0, max_steps=10, lr_scheduler="constant")
    assert constant.learning_rate_at(9, 10) == 8.0


def test_epochs_count_full_batches():
    assert WarmupConfig(num_epochs=1.5, batch_size=4).total_steps(19) == 6
    with pytest.raises(WarmupError, match="3 rows do not fill one batch; lower --batch_size 4"):
        WarmupConfig(num_epochs=1, batch_size=4).total_steps(3)


def test_an_epoch_shows_every_row_once_in_an_order_given_by_the_seed():
    rows = [Example((*range(1 + i % 7), 100 + i), 1) for i in range(340)]

    def epochs(seed: int, n: int) -> list[list[Example]]:
        stream = batches(rows, 3, seed)
        return [[row for _ in range(113) for row in next(stream)] for _ in range(n)]

    first, second = epochs(0, 2)
    assert len(set(first)) == 339 and len(set(second)) == 339
    assert first != second
    assert epochs(0, 1)[0] == first
    assert epochs(1, 1)[0] != first
    stream = batches(rows, 3, 0)
    # Buckets: within a batch lengths hardly differ.
    assert max(len(b[-1].token_ids) - len(b[0].token_ids) for b in (next(stream) for _ in range(50))) <= 1


def test_loss_is_the_cross_entropy_of_each_response_by_itself(data, tokenizer, model):
    model.eval()
    examples = load(data, tokenizer)
    expected = 0.0
    for example in examples:
        ids = torch.tensor([example.token_ids])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for at in range(example.n_prompt, len(example.token_ids)):
            expected -= logprobs[at - 1, example.token_ids[at]].item()
    assert summed_loss(model, examples, pad_id=0, device=CPU).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_do_not_change_the_update(data, tokenizer, model, micro, tmp_path):
    examples = load(data, tokenizer)
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def trained(micro_batch_size: int | None) -> list[torch.Tensor]:
        model.load_state_dict(start)
        config = WarmupConfig(max_steps=2, batch_size=4, micro_batch_size=micro_batch_size, learning_rate=1e-3)
        train(model, examples, config, pad_id=0, device=CPU, log_path=tmp_path / "log.jsonl")
        return [p.detach().clone() for p in model.parameters()]

    for whole, split in zip(trained(None), trained(micro)):
        torch.testing.assert_close(whole, split, rtol=0, atol=2e-5)


def test_a_loss_that_is_not_finite_stops_the_run(data, tokenizer, model, tmp_path):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    config = WarmupConfig(max_steps=2, batch_size=4)
    with pytest.raises(WarmupError, match="lower --learning_rate"):
        train(model, load(data, tokenizer), config, pad_id=0, device=CPU, log_path=tmp_path / "log.jsonl")


def test_saved_ends_hold_the_learned_end_and_keep_the_others(model, tokenizer, tmp_path):
    model.generation_config.eos_token_id = [9]
    save(model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 9]


def test_the_command_teaches_the_data_and_writes_a_folder_that_loads(data, tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path / "init")
    tokenizer.save_pretrained(tmp_path / "init")
    flags = ["--model_name_or_path", str(tmp_path / "init"), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    flags += [
        "--max_steps",
        "60",
        "--batch_size",
        "4",
        "--learning_rate",
        "1e-2",
        "--log_steps",
        "25",
        "--device",
        "cpu",
    ]
    assert main(flags) == 0

    log = [json.loads(line) for line in (tmp_path / "out" / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in log] == [25, 50, 60]
    assert log[-1]["loss"] < 0.2 < log[0]["loss"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert trained.generation_config.eos_token_id == 1
    for row in ROWS:
        ids = torch.tensor([loaded.encode(row["prompt"])])
        out = trained.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert loaded.decode(out[0, ids.shape[1] :]) == row["response"] + " </s>"


def test_the_command_reports_errors_without_a_traceback(data, tmp_path, capsys):
    flags = ["--model_name_or_path", str(tmp_path / "none"), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    assert main([*flags, "--max_steps", "1"]) == 2
    assert "error: --model_name_or_path" in capsys.readouterr().err
    assert main([*flags]) == 2
    assert "exactly one of" in capsys.readouterr().err
    flags[-1] = flags[1]
    assert main([*flags, "--max_steps", "1"]) == 2
    assert "would be overwritten" in capsys.readouterr().err
