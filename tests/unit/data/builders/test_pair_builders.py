"""Pairs, on rows written here in the forms that the data sets' own repositories document; and the files they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from real_openrlhf.data.__main__ import main
from real_openrlhf.data.builders.base import FieldError
from real_openrlhf.data.builders.pairs import PAIR_BUILDERS
from real_openrlhf.data.builders.pairs.base import Pair
from real_openrlhf.data.pairs import SCHEMA
from real_openrlhf.data.preferences import majority, vote_agreement

JUDGEBENCH = {
    "pair_id": "p-1",
    "original_id": 4,
    "source": "sums",
    "question": "What is 2 + 2?",
    "response_model": "m",
    "response_A": "5",
    "response_B": "4",
    "label": "B>A",
}
LLMBAR = {"input": "Name a colour.", "output_1": "Red.", "output_2": "Colours are nice.", "label": 1}
PANDALM = {
    "idx": 3,
    "motivation_app": "Mail",
    "cmp_key": "m_n",
    "instruction": "Shorten.",
    "input": "It is very very cold.",
    "response1": "It is cold.",
    "response2": "Cold.",
    "annotator1": 1,
    "annotator2": 0,
    "annotator3": 1,
}
REWARD_BENCH = {
    "prompt": "Say hello.",
    "chosen": "Hello!",
    "chosen_model": "m",
    "rejected": "No.",
    "rejected_model": "n",
    "subset": "chat-easy",
    "id": 0,
}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def vote(judge: object, winner: str, models: str = "xy", turn: int = 1, question: int = 81) -> dict[str, Any]:
    talks = {model: said("Write.", f"{model} one", "Shorter.", f"{model} two") for model in "xyz"}
    return {
        "question_id": question,
        "model_a": models[0],
        "model_b": models[1],
        "winner": winner,
        "judge": judge,
        "conversation_a": talks[models[0]],
        "conversation_b": talks[models[1]],
        "turn": turn,
    }


def read(name: str, row: dict[str, Any]) -> Pair:
    return PAIR_BUILDERS[name].read(row)


def build(folder: Path, name: str, rows: list[dict[str, Any]], *flags: str) -> int:
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return main([name, "--source", str(source), "--output_dir", str(folder / "out"), "--overwrite", *flags])


def built(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "out" / "pairs.parquet").to_pylist()


@pytest.mark.parametrize(
    ("name", "row", "question", "responses", "votes"),
    [
        ("judgebench", JUDGEBENCH, "What is 2 + 2?", ("5", "4"), {"check": "b"}),
        ("judgebench", {**JUDGEBENCH, "label": "A>B"}, "What is 2 + 2?", ("5", "4"), {"check": "a"}),
        ("llmbar", LLMBAR, "Name a colour.", ("Red.", "Colours are nice."), {"authors": "a"}),
        ("llmbar", {**LLMBAR, "label": "2"}, "Name a colour.", ("Red.", "Colours are nice."), {"authors": "b"}),
        (
            "pandalm",
            PANDALM,
            "Shorten.\n\nIt is very very cold.",
            ("It is cold.", "Cold."),
            {"annotator1": "a", "annotator2": "tie", "annotator3": "a"},
        ),
        ("reward_bench", REWARD_BENCH, "Say hello.", ("Hello!", "No."), {"chosen": "a"}),
    ],
)
def test_rows_become_pairs(
    name: str, row: dict[str, Any], question: str, responses: tuple[str, str], votes: dict[str, str]
) -> None:
    pair = read(name, row)
    assert (pair.instruction, pair.response_a, pair.response_b, pair.votes) == (question, *responses, votes)


@pytest.mark.parametrize(
    ("name", "row", "column", "message"),
    [
        ("judgebench", {**JUDGEBENCH, "label": "A=B"}, "label", "expected A>B or B>A, got 'A=B'"),
        ("judgebench", {**JUDGEBENCH, "response_B": None}, "response_B", "expected text"),
        ("llmbar", {**LLMBAR, "label": 0}, "label", "expected 1 or 2, got 0"),
        ("llmbar", {**LLMBAR, "label": True}, "label", "expected 1 or 2, got True"),
        ("llmbar", {k: v for k, v in LLMBAR.items() if k != "output_2"}, "output_2", "no such column"),
        ("pandalm", {**PANDALM, "annotator2": 3}, "annotator2", r"expected 0 \(a tie\), 1 or 2, got 3"),
        ("pandalm", {**PANDALM, "response1": True}, "response1", "expected text, got True"),
        ("pandalm", {k: v for k, v in PANDALM.items() if "anno" not in k}, "annotator1", "no such column"),
        ("reward_bench", {**REWARD_BENCH, "rejected": "Hello!"}, "rejected", "the same text as chosen"),
        ("reward_bench", {**REWARD_BENCH, "rejected": ["No.", "Nah."]}, "rejected", "expected text"),
        ("reward_bench", {**REWARD_BENCH, "chosen": ["Hello!"], "rejected": ["a", "b"]}, "chosen", "RewardBench 2"),
        ("reward_bench", {**REWARD_BENCH, "prompt": []}, "prompt", "expected text, or messages"),
        (
            "reward_bench",
            {"chosen": said("Hi.", "Hello!"), "rejected": said("Ho.", "No.")},
            "rejected",
            "its messages before the last",
        ),
        ("reward_bench", {"chosen": said("Hi."), "rejected": said("Hi.")}, "chosen", "then a message of the assistant"),
    ],
)
def test_bad_rows_are_named(name: str, row: dict[str, Any], column: str, message: str) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        read(name, row)
    assert caught.value.column == column


def test_whole_conversations_are_pairs_too() -> None:
    row = {"chosen": said("Hi.", "Hello!", "More.", "Yes?"), "rejected": said("Hi.", "Hello!", "More.", "No.")}
    pair = read("reward_bench", row)
    assert pair.instruction == "User: Hi.\n\nAssistant: Hello!\n\nUser: More."
    assert (pair.response_a, pair.response_b) == ("Yes?", "No.")
    single = read("reward_bench", {"chosen": said("Hi.", "Hello!"), "rejected": said("Hi.", "No.")})
    assert single.instruction == "Hi." and single.group == pair.group
    listed = read("reward_bench", {**REWARD_BENCH, "prompt": said("Say hello.")})
    assert listed.instruction == "Say hello."


def test_the_votes_on_two_models_are_one_pair_in_either_order(tmp_path: Path) -> None:
    rows = [
        vote("expert_0", "model_a"),
        vote("expert_1", "model_a", models="yx"),
        vote("expert_2", "tie (bothbad)"),
        vote("expert_0", "model_b", models="yx", turn=2),
        vote("expert_0", "model_b", models="xz"),
        vote("expert_3", "model_b"),
        vote(["gpt-4", "pair-v2"], "model_b"),
    ]
    assert build(tmp_path, "mt_bench_human", rows) == 0
    one, second, other = built(tmp_path)
    votes = {"expert_0": "a", "expert_1": "b", "expert_2": "tie", "expert_3": "b", "gpt-4/pair-v2": "b"}
    assert json.loads(one["meta"])["votes"] == votes and (one["preference"], one["n"]) == ("b", 5)
    assert (one["instruction"], one["response_a"], one["response_b"]) == ("Write.", "x one", "y one")
    # The second turn is judged after each model's own first answer.
    assert second["response_a"] == "x one\n\nUser: Shorter.\n\nAssistant: x two" and second["preference"] == "a"
    assert [row["subset"] for row in (one, second, other)] == ["turn-1", "turn-2", "turn-1"]
    assert one["group"] == second["group"] and other["response_b"] == "z one"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (vote("e", "both"), "line 2, column 'winner': expected model_a, model_b or tie, got 'both'"),
        (vote("expert_0", "model_a"), "line 2, column 'judge': expert_0 has voted"),
        (vote("e", "tie", turn=3), "line 2, column 'turn': expected 1 or 2, got 3"),
        (vote("e", "tie", models="xx"), "line 2, column 'model_b': both models are x"),
        ({**vote("e", "tie", "xz"), "conversation_b": said("Write.")}, "line 2, column 'conversation_b': expected 2"),
        (
            {**vote("e", "tie", "xz"), "conversation_b": said("Sing.", "z")},
            "line 2, column 'conversation_b': its quest",
        ),
        ({**vote("e", "tie", "xz"), "conversation_a": said("Write.", "x")[::-1]}, "column 'conversation_a.0'"),
    ],
)
def test_bad_votes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], message: str
) -> None:
    assert build(tmp_path, "mt_bench_human", [vote("expert_0", "model_a"), row]) == 2
    assert message in capsys.readouterr().err


def test_majorities() -> None:
    assert majority({"x": "a", "y": "tie", "z": "tie"}) == "tie" and majority({"x": "b"}) == "b"
    assert majority({"x": "a", "y": "b", "z": "tie"}) is None and majority({"x": "a", "y": "b"}) is None
    # Of the comparisons a-a, a-tie, a-tie and a-b, b-b, b-a: two agree of six.
    votes = [{"x": "a", "y": "a", "z": "tie"}, {"x": "a", "y": "b", "z": "b"}, {"x": "a"}]
    assert vote_agreement(votes) == {"rows": 2, "compared": 6, "agreement": pytest.approx(2 / 6)}
    assert vote_agreement([{"x": "a"}]) is None


def test_the_files_and_what_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = {**PANDALM, "idx": 4, "annotator1": 2}  # 2, 0, 1
    assert build(tmp_path, "pandalm", [PANDALM, split, {**PANDALM, "annotator1": 9}], "--skip_bad_rows") == 0
    (row,) = built(tmp_path)
    assert (row["id"], row["preference"], row["n"], row["source"], row["source_row"]) == (
        "0:3",
        "a",
        3,
        "source.jsonl",
        1,
    )
    assert pq.read_schema(tmp_path / "out/pairs.parquet").equals(SCHEMA)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["dropped"] == {"no majority of the votes": 1} and manifest["preferences"] == {
        "a": 1,
        "b": 0,
        "tie": 0,
    }
    assert manifest["raters"] == {"rows": 2, "compared": 6, "agreement": pytest.approx(1 / 6)}
    told = capsys.readouterr().out
    assert "dropped, no majority of the votes: 1" in told and "line 3, column 'annotator1'" in told
    assert "two give the same vote in 16.7% of 6 comparisons" in told and "evaluate: --pairs pandalm=" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sft",), "--sft: llmbar has pairs"),
        (("--scale", "1-5"), "--scale: llmbar has pairs"),
        ((), "column 'label': expected 1 or 2"),
    ],
)
def test_what_pairs_do_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert build(tmp_path, "llmbar", [{**LLMBAR, "label": 3}], *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out/pairs.parquet").exists()


def test_pairs_have_no_splits_and_need_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "llmbar", [LLMBAR])
    source = f"train={tmp_path / 'source.jsonl'}"
    assert main(["llmbar", "--source", source, "--output_dir", str(tmp_path / "b")]) == 2
    assert "pairs are for evaluation and have no splits" in capsys.readouterr().err
    assert main(["llmbar", "--output_dir", str(tmp_path / "b")]) == 2
    assert "llmbar needs --source" in capsys.readouterr().err
    assert main(["llmbr", "--output_dir", str(tmp_path / "b")]) == 2
    assert "did you mean 'llmbar'" in capsys.readouterr().err
