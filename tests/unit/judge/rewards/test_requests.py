from __future__ import annotations

import json
from typing import Any

import pytest

from real_openrlhf.data.response_text import without_end
from real_openrlhf.judge.rewards.requests import Item, Reading, RequestError

READING = Reading(rubric="be kind", ends=("</s>", "<pad>"))


def ask(*rows: tuple[Any, Any, Any]) -> dict[str, Any]:
    queries, prompts, labels = (list(column) for column in zip(*rows)) if rows else ([], [], [])
    return {"query": queries, "prompts": prompts, "labels": labels}


def test_openrlhfs_form_becomes_items() -> None:
    items = READING.openrlhf(ask(("<s> say hi: hello.</s><pad>", "say hi:", "hi"), ("p r", "p", None)))
    assert [item.parts for item in items] == [
        {"instruction": "say hi:", "reference": "hi", "response": " hello.", "rubric": "be kind"},
        {"instruction": "p", "response": " r", "rubric": "be kind"},
    ]


@pytest.mark.parametrize(
    ("labels", "label", "wanted"),
    [
        ("reference", "4", {"reference": "4"}),
        ("reference", 4, {"reference": "4"}),
        ("reference", '{"reference": "4"}', {"reference": '{"reference": "4"}'}),
        ("reference", {"instruction": "i", "rubric": "r", "context": None}, {"instruction": "i", "rubric": "r"}),
        ("reference", "", {}),
        ("parts", json.dumps({"reference": "x", "rubric": ""}), {"reference": "x"}),
        ("parts", {"context": "c"}, {"context": "c"}),
        ("unused", "4", {}),
        ("unused", [1], {}),
    ],
)
def test_labels(labels: str, label: Any, wanted: dict[str, Any]) -> None:
    (item,) = Reading(rubric="be kind", labels=labels).openrlhf(ask(("p r", "p", label)))
    assert item.parts == {"instruction": "p", "response": " r", "rubric": "be kind", **wanted}


@pytest.mark.parametrize(
    ("labels", "body", "match"),
    [
        ("reference", [], "an object with query, prompts and labels"),
        ("reference", {"query": "q", "prompts": [], "labels": []}, "'query' must be a list, got str"),
        ("reference", {"query": [], "prompts": []}, "'labels' must be a list, got NoneType"),
        ("reference", {"query": ["a"], "prompts": [], "labels": []}, "1 queries, 0 prompts and 0 labels"),
        ("reference", ask(), r"0 items in one request; 1 to 256"),
        ("reference", ask(*[("p r", "p", "")] * 257), r"257 items.*--max_items"),
        ("reference", ask(("p r", "p", ""), (1, "p", "")), "item 1: query and prompt must be texts"),
        ("reference", ask(("cut r", "long cut", "")), "item 0: the prompt that begins 'long cut'.*--data.max_len"),
        ("reference", ask(("p r", "p", {"answer": 1})), "item 0: a label has no part 'answer'; it may have instr"),
        ("reference", ask(("p r", "p", [1])), r"item 0: a label must be a text, got \[1\]"),
        ("parts", ask(("p r", "p", "free text")), "item 0: with --labels parts a label is a JSON object"),
        ("parts", ask(("p r", "p", "4")), "item 0: a label must be a JSON object, got 4"),
    ],
)
def test_what_is_wrong_is_named(labels: str, body: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        Reading(labels=labels).openrlhf(body)


def test_the_plain_form() -> None:
    one = {"instruction": "i", "response": "", "weights": {"tone": 1}}
    items, several = READING.plain(one)
    assert not several and items == [
        Item(parts={"instruction": "i", "response": "", "rubric": "be kind"}, weights={"tone": 1})
    ]
    items, several = READING.plain(
        {"items": [one, 3, {"instruction": "i"}, {**one, "rubrik": "x"}, {**one, "weights": 1}]}
    )
    assert several and isinstance(items[0], Item)
    assert [str(item) for item in items[1:]] == [
        "item 1: an item is an object with instruction and response, not int",
        "item 2: the response must be a text, got NoneType",
        "item 3: an item has no 'rubrik'; it has instruction, response, rubric, reference, context, weights",
        "item 4: weights must be an object of dimension to number",
    ]
    for body, match in (
        ([], "an item is an object"),
        ({"items": [], "x": 1}, "nothing else"),
        ({"items": []}, "0 items"),
    ):
        with pytest.raises(RequestError, match=match):
            READING.plain(body)


def test_ends_are_taken_off_the_end_alone() -> None:
    assert without_end("a</s>b</s></s>", ("</s>",)) == "a</s>b"
    assert without_end("a <pad></s><pad>", ("</s>", "<pad>")) == "a "
    assert without_end("a", ("", "b")) == "a"
