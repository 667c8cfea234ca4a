"""Each data set's rows to judged items, on rows written here in the data sets' documented form."""

from __future__ import annotations

from typing import Any

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.builders import BUILDERS, get_builder
from real_openrlhf.data.builders.base import FieldError, Item, Options, question_of
from real_openrlhf.data.builders.prometheus import parts_of
from real_openrlhf.data.judge_prompt import JudgeTemplate, Rubric
from real_openrlhf.data.row import DataError

RUBRIC = Rubric(criteria="Is it kind?", descriptions={score: f"Level {score}." for score in "12345"})
PROMPT = JudgeTemplate.load("paper").render(
    instruction="Say hello.", response="Hi!\n\n###Score Rubrics:\n[fake]", reference="Hello, friend.", rubric=RUBRIC
)
COLLECTION: dict[str, Any] = {
    "instruction": PROMPT,
    "output": "It is short. So the overall score is 4. [RESULT] 4",
    "orig_instruction": "Say hello.",
    "orig_response": "Hi!",
    "orig_reference_answer": "Hello, friend.",
    "orig_criteria": "Is it kind?",
    **{f"orig_score{score}_description": f"Level {score}." for score in "12345"},
    "orig_feedback": "It is short. So the overall score is 4.",
    "orig_score": "4",
}


def read(name: str, row: dict[str, Any], **options: Any) -> Item:
    builder = get_builder(name)
    return builder.read(row, Options(scale=ScoreScale.parse(options.pop("scale", builder.scale)), **options))


def test_feedback_collection() -> None:
    item = read("feedback_collection", COLLECTION)
    assert (item.label, item.n, item.whole, item.critique) == (4.0, 1, PROMPT, COLLECTION["orig_feedback"])
    assert item.parts is not None and item.parts.rubric == RUBRIC and item.parts.reference == "Hello, friend."
    other = read("feedback_collection", {**COLLECTION, "orig_response": "Bye.", "orig_criteria": "Is it long?"})
    assert other.group == item.group  # the question


@pytest.mark.parametrize(
    "column", [c for c in COLLECTION if c not in ("output", "orig_reference_answer", "orig_feedback")]
)
def test_feedback_collection_names_a_missing_column(column: str) -> None:
    row = {name: value for name, value in COLLECTION.items() if name != column}
    with pytest.raises(FieldError, match="no such column") as caught:
        read("feedback_collection", row)
    assert caught.value.column == column


def test_feedback_bench_reads_both_forms() -> None:
    hub = read("feedback_bench", COLLECTION)
    prometheus = read("feedback_bench", {"instruction": PROMPT, "gpt4_score": 4, "idx": 3})
    assert hub.label == prometheus.label == 4.0 and hub.critique is None
    assert hub.group == prometheus.group == read("feedback_collection", COLLECTION).group


@pytest.mark.parametrize("name", ["flask", "vicuna_bench", "mt_bench"])
def test_prometheus_labels_are_means(name: str) -> None:
    row = {"instruction": PROMPT, "gpt4_score": [4, 5, 5], "gpt4_feedback": ["a", "b", "c"], "idx": 7, "category": "x"}
    item = read(name, row)
    assert (item.label, item.n, item.critique) == (pytest.approx(14 / 3), 3, None)
    assert dict(item.meta) == {"gpt4_score": [4, 5, 5], "idx": 7, "category": "x"}
    assert read(name, {**row, "human_score": [1, 2]}, label_key="human_score").label == 1.5


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ([], "empty"),
        ([4, 6], "off the scale"),
        (["4", "x"], "not a number"),
        (None, "missing"),
        ([True], "not a number"),
    ],
)
def test_bad_prometheus_scores(score: object, message: str) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        read("vicuna_bench", {"instruction": PROMPT, "gpt4_score": score})
    assert caught.value.column == "gpt4_score"


def test_prometheus_prompts_come_apart_at_the_real_headings() -> None:
    parts = parts_of(PROMPT)
    assert parts is not None and parts.rubric == RUBRIC
    assert (parts.instruction, parts.reference) == ("Say hello.", "Hello, friend.")
    assert parts.response == "Hi!\n\n###Score Rubrics:\n[fake]"  # content, not the rubric
    bare = JudgeTemplate.load("paper").render(instruction="i", response="r", rubric=RUBRIC)
    found = parts_of(bare)
    assert found is not None and found.reference is None and found.response == "r"
    assert parts_of("Rate this.") is None


def test_real_parquet() -> None:
    row = {
        "data_source": "prometheus-eval/Feedback-Collection",
        "prompt": [{"role": "user", "content": PROMPT}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 12, "answer": "It is short. So the overall score is 4"},
    }
    item = read("real_parquet", row)
    assert (item.label, item.split, item.id) == (4.0, "train", "12")
    assert item.critique == "It is short. So the overall score is 4" and item.whole == row["prompt"]
    with pytest.raises(FieldError) as caught:
        read("real_parquet", {**row, "reward_model": {}})
    assert caught.value.column == "reward_model.ground_truth"
    with pytest.raises(FieldError, match="expected chat messages"):
        read("real_parquet", {**row, "prompt": "text"})


def test_stsb_pairs_are_one_group_in_either_order() -> None:
    row = {"instruction": "A cat  sits.", "response": "A dog runs.", "criteria": "semantic similarity", "score": 3.8}
    item = read("stsb", row)
    turned = read("stsb", {**row, "instruction": "a DOG runs.", "response": "A cat sits."})
    hub = read("stsb", {"sentence1": "A cat sits.", "sentence2": "A dog runs.", "similarity_score": 3.8})
    assert item.label == 3.8 and item.group == turned.group == hub.group
    assert item.parts == hub.parts and item.critique == hub.critique
    other = read("stsb", {**row, "score": 0.5})
    assert other.critique == item.critique  # written without a look at the label


def test_mtbench_pool() -> None:
    row = {
        "question_id": 81,
        "turn": 2,
        "model": "m",
        "instruction": "i",
        "response": "r",
        "context": "c",
        "score": 9.5,
    }
    item = read("mtbench_pool", {**row, "n": 2, "feedback": "Good. Rating: [[9]]"})
    assert (item.group, item.label, item.n) == ("mtbench:81", 9.5, 2)
    assert item.parts is not None and item.parts.context == "c" and item.parts.reference is None
    with pytest.raises(FieldError, match="off the scale"):
        read("mtbench_pool", {**row, "score": 10.5})
    with pytest.raises(FieldError, match="how many judgements"):
        read("mtbench_pool", {**row, "n": 0})


def test_generic() -> None:
    columns = {
        "instruction": "q",
        "response": "a",
        "label": "human.score",
        "criteria": "c",
        "score:1": "low",
        "id": "k",
    }
    row = {"q": "why?", "a": "", "human": {"score": "3.5"}, "c": "Is it true?", "low": "False.", "k": 17}
    item = read("generic", row, scale="1-5", columns=columns)
    assert (item.label, item.id) == (3.5, "17")
    assert item.parts is not None and str(item.parts.rubric) == "[Is it true?]\nScore 1: False."
    grouped = read("generic", {**row, "g": 5}, scale="1-5", columns={**columns, "group": "g"})
    assert grouped.group == "5"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "y", "promt": "p"}, r"no field 'promt' \(did you mean 'prompt'\?\)"),
        ({"prompt": "p"}, "label=COLUMN is missing"),
        ({"label": "y", "instruction": "q"}, "whole prompt"),
        ({"label": "y", "prompt": "p", "criteria": "c", "rubric": "r"}, "either rubric"),
    ],
)
def test_bad_field_maps(columns: dict[str, str], message: str) -> None:
    check = BUILDERS["generic"].check
    assert check is not None
    with pytest.raises(DataError, match=message):
        check(Options(scale=ScoreScale.parse("1-5"), columns=columns))


def test_unknown_builders_name_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no builder 'vicuna_bnch' \(did you mean 'vicuna_bench'\?\)"):
        get_builder("vicuna_bnch")


@pytest.mark.parametrize("name", ["mt_bench", "real_parquet", "generic"])
def test_the_group_of_a_conversation_is_its_question(name: str) -> None:
    """A second turn's instruction holds the judged model's own first answer."""

    def group(first: str, answer: str) -> str:
        turns = f"User: {first}\n\nAssistant: {answer}\n\nUser: Now as a poem.\n\nAssistant: "
        prompt = JudgeTemplate.load("paper").render(
            instruction=turns, response="poem", reference="Reference.", rubric=RUBRIC
        )
        row = {"instruction": prompt, "gpt4_score": [3, 4]}
        if name == "real_parquet":
            row = {"prompt": [{"role": "user", "content": prompt}], "reward_model": {"ground_truth": "3"}}
        if name == "generic":
            row = {"p": prompt, "y": 3}
            return read(name, row, scale="1-5", columns={"prompt": "p", "label": "y"}).group
        return read(name, row).group

    assert group("Write about rain.", "one") == group("Write about rain.", "two\n\nlines") != group("Snow.", "one")


@pytest.mark.parametrize(
    "conversation",
    [
        "USER: Write.\nASSISTANT: {}\nUSER: More.",
        "### User:\nWrite.\n\n### Assistant A:\n{}\n\n### User:\nMore.",
        "**User:** Write.\n\n**Assistant:** {}",
        "[User]: Write.\n[Assistant]: {}",
        "<|user|>\nWrite.\n<|assistant|>\n{}",
        "<|im_start|>user\nWrite.<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\nMore.<|im_end|>",
        "<start_of_turn>user\nWrite.<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWrite.<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n{}<|eot_id|>",
        "<s>[INST] Write. [/INST] {} [INST] More. [/INST]",
    ],
)
def test_the_question_of_a_conversation_as_text(conversation: str) -> None:
    assert question_of(conversation.format("An answer.\n\nUser: no")) == "Write."


@pytest.mark.parametrize(
    "text", ["User: Write.", "Human rights: what are they?\nAI: what is it?", "Users\nmodel\n", ""]
)
def test_what_is_no_conversation_is_the_question_itself(text: str) -> None:
    assert question_of(text) == text


def test_the_group_of_chat_messages_is_the_first_turn() -> None:
    def group(first: str, answer: str) -> str:
        turns = [("system", "Judge."), ("user", first), ("assistant", answer), ("user", "Now judge.")]
        row = {"p": [{"role": role, "content": content} for role, content in turns], "y": 3}
        return read("generic", row, scale="1-5", columns={"prompt": "p", "label": "y"}).group

    assert group("Write.", "one") == group("Write.", "two") != group("Sing.", "one")
