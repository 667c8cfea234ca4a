"""The MT-Bench example's data: splits by question, short rows, critiques without their verdict, Vicuna's scale."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from examples.mtbench import prepare
from real_openrlhf.data.row import DataError
from tests.helpers.mtbench_files import write_judgments, write_vicuna
from tests.helpers.tokenizers import word_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's files and a tokenizer, which knows few words: every word is a token."""
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_judgments(tmp_path / "mtbench_judgments.jsonl.gz")
    write_vicuna(tmp_path / "vicuna_eval.json")
    return tmp_path


def run(folder: Path, *flags: str) -> None:
    out = str(folder / "out")
    words = ["--data_dir", str(folder), "--tokenizer", str(folder / "tokenizer"), "--output_dir", out]
    prepare.main([*words, *flags])


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"out/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_question_is_in_one_split_and_critiques_lose_their_verdict(folder: Path) -> None:
    run(folder)
    questions = {name: {row["group"] for row in rows(folder, name)} for name in prepare.SPLITS}
    assert all(questions.values()) and sum(map(len, questions.values())) == len(set.union(*questions.values()))
    sft = rows(folder, "sft")
    assert {row["group"] for row in sft} <= questions["train"]
    for row in sft:
        before, _, score = row["response"].rpartition("Score: ")
        assert score == f"{row['label']:g}" and "Rating" not in before and "[[" not in before and before.strip()
    # Turn 2 comes with what was said before.
    assert any(row["prompt"].startswith("Before: ") for row in rows(folder, "train"))
    # Averaged judgements are judged against, and not learned from.
    assert any(row["label"] % 1 for row in rows(folder, "train")) and not any(row["label"] % 1 for row in sft)


def test_long_rows_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder)
    everything = rows(folder, "train")
    with caplog.at_level("INFO"):
        run(folder, "--max_prompt", "45", "--max_response", "12", "--max_prompt_vicuna", "1000")
    kept = rows(folder, "train")
    assert 0 < len(kept) < len(everything) and all(row in everything for row in kept)
    assert f"({len(everything) - len(kept)} longer ones left out)" in caplog.text
    with pytest.raises(DataError, match=r"train: no row of \d+ is within --max_prompt 3; raise it"):
        run(folder, "--max_prompt", "3")


def test_vicuna_is_stretched_and_shares_no_question_with_train(folder: Path) -> None:
    run(folder)
    # The scores 1, 3 and 5, and a mean of 4 1/3.
    labels = [row["label"] for row in rows(folder, "vicuna")]
    assert sorted(labels) == pytest.approx([1.0, 5.5, 8.5, 10.0])
    assert not any("rubric" in row["prompt"].lower() for row in rows(folder, "vicuna"))
    known = next(row for row in rows(folder, "train") if "Before" not in row["prompt"])
    question = known["prompt"].split("Question: ")[1].split("\nAnswer: ")[0]
    write_vicuna(folder / "vicuna_eval.json", first_question=question)
    run(folder)
    assert len(rows(folder, "vicuna")) == 3


def test_missing_and_bad_files_are_named(folder: Path) -> None:
    (folder / "vicuna_eval.json").unlink()
    run(folder)
    assert not (folder / "out/vicuna.jsonl").exists()
    path = folder / "mtbench_judgments.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"question_id": 1}\n'))
    with pytest.raises(DataError, match=r"no usable row|no column|such column"):
        run(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"there is no mtbench_judgments\.jsonl or"):
        run(folder)
