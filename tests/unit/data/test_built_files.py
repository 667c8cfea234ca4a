"""What builders write is what training and the warm-up read."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.config.cli import parse_args
from real_openrlhf.data.__main__ import main
from real_openrlhf.data.dataset import JudgeDataset
from real_openrlhf.data.given import GivenDataset
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.evaluate import parse_args as evaluate_args
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer


def test_training_and_warmup_read_what_is_written(tmp_path: Path) -> None:
    labels = (1, 7, 8.5)
    rows = [{"q": "Why?", "a": f"Answer {k}", "y": y, "f": f"Fine {k}. Rating: [[{y}]]"} for k, y in enumerate(labels)]
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = ["instruction=q", "response=a", "label=y", "feedback=f"]
    flags = ["--map", *columns, "--scale", "1-10", "--template", "single_answer", "--sft"]
    assert main(["generic", "--source", str(source), "--output_dir", str(out), *flags]) == 0
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    for chat in (False, True):  # the chat template, and with it the thinking mode, stays a choice of training
        data = JudgeDataset.load(
            str(out / "train.parquet"),
            input_key="prompt",
            label_key="label",
            scale=ScoreScale.parse("1-10"),
            tokenizer=tokenizer,
            template=PromptTemplate(apply_chat_template=chat, enable_thinking=False if chat else None),
            max_prompt_tokens=1000,
        )
        assert [prompt.label for prompt in data.prompts] == [1, 7, 8.5]
        assert ("<assistant>" in data.prompts[0].text) == chat and "Answer 0" in data.prompts[0].text
    words = [
        word
        for row in pq.read_table(out / "sft.parquet").to_pylist()
        for word in row["response"].replace(".", " . ").split()
    ]
    known = word_tokenizer(extra_words=[*words, "10"])
    bound = bind_scale(ScoreScale.parse("1-10"), known)
    given = GivenDataset.load(
        str(out / "sft.parquet"),
        input_key="prompt",
        label_key="label",
        response_key="response",
        tokenizer=known,
        template=PromptTemplate(),
        reader=ScoreReader.build(bound, known, {known.eos_token_id}),
        max_len=1000,
        max_prompt_tokens=500,
    )
    assert len(given.responses) == 3
    written = [row["response"] for row in pq.read_table(out / "sft.parquet").to_pylist()]
    assert written[:2] == ["Fine 0. So the overall score is 1", "Fine 1. So the overall score is 7"]
    assert written[2] in ("Fine 2. So the overall score is 8", "Fine 2. So the overall score is 9")


def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str) -> dict[str, list[str]]:
    """Command -> its words, as a build of labels alone prints them."""
    source = tmp_path / "a b.csv"
    source.write_text("question,answer,score\n" + "".join(f"Q{n}?,yes,{1 + n % 5}\n" for n in range(60)))
    columns = ["--map", "instruction=question", "response=answer", "label=score", "--scale", "1-5"]
    words = ["generic", "--source", str(source), "--output_dir", str(tmp_path / split), *columns, "--split", split]
    capsys.readouterr()
    assert main([*words, "--template", "answer", "--sft"]) == 0
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    return {name: shlex.split(tail) for name, _, tail in lines if name in ("train_real", "train_warmup", "evaluate")}


def test_the_flags_that_are_printed_are_flags_and_name_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(tmp_path, capsys, "train=0.6,dev=0.2,test=0.2")
    real = parse_args(found["train_real"])
    # The best weights are chosen on one split, and measured on another.
    assert [Path(str(p)).name for p in (real.data.prompt_dataset, real.eval.dataset)] == [
        "train.parquet",
        "dev.parquet",
    ]
    warmup = parse_args(found["train_warmup"], warmup=True)
    assert Path(warmup.data.prompt_dataset).is_file() and warmup.warmup.feedback == "missing"
    (benchmark,) = evaluate_args(found["evaluate"]).benchmark
    assert benchmark.startswith("test=") and Path(benchmark.removeprefix("test=")).is_file()

    found = printed(tmp_path, capsys, "train=0.7,test=0.3")
    assert Path(str(parse_args(found["train_real"]).eval.dataset)).name == "test.parquet" and "evaluate" not in found
