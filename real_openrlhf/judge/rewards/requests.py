"""What a request asks for: one item for the judge per response, checked before anything is generated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from real_openrlhf.data.response_text import response_of, without_end
from real_openrlhf.data.template import PromptError
from real_openrlhf.judge.judge import ITEM_KEYS
from real_openrlhf.judge.types import LABELS

REFERENCE, PARTS, UNUSED = LABELS
# What a label with parts may say; the response is the policy's.
LABEL_KEYS = tuple(key for key in ITEM_KEYS if key != "response")
_WEIGHTS = "weights"


class RequestError(ValueError):
    """The request cannot be understood; the message says what would work, `status` is HTTP's."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Item:
    """parts: as `Judge.prepare` takes them; weights: of the rubric's dimensions, None: those of the server."""

    parts: dict[str, Any]
    weights: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How requests become items.

    rubric     for items without one; None: they have none
    labels     OpenRLHF's labels: "reference": a reference answer; "parts": JSON objects with some of LABEL_KEYS;
               "unused". A label that is an object is read as parts, unless labels are unused.
    ends       texts that end a response and are no part of it, such as "</s>"
    max_items  most responses in one request
    """

    rubric: Any = None
    labels: str = REFERENCE
    ends: tuple[str, ...] = ()
    max_items: int = 256

    def openrlhf(self, body: Any) -> list[Item]:
        """OpenRLHF's form, {"query": [...], "prompts": [...], "labels": [...]}; a query is a prompt and its response.

        The instruction is the label's, if it names one, else the prompt as the policy saw it.
        """
        if not isinstance(body, dict):
            raise RequestError("the request must be an object with query, prompts and labels, as OpenRLHF sends it")
        lists = {name: body.get(name) for name in ("query", "prompts", "labels")}
        for name, values in lists.items():
            if not isinstance(values, list):
                raise RequestError(f"{name!r} must be a list, got {type(values).__name__}; OpenRLHF sends three lists")
        queries, prompts, labels = lists.values()
        assert queries is not None and prompts is not None and labels is not None
        if not len(queries) == len(prompts) == len(labels):
            raise RequestError(f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels")
        self._check_number(len(queries))
        items = []
        for i, (query, prompt, label) in enumerate(zip(queries, prompts, labels)):
            try:
                if not isinstance(query, str) or not isinstance(prompt, str):
                    raise RequestError("query and prompt must be texts")
                parts = {"instruction": prompt, **self._label(label)}
                parts["response"] = without_end(response_of(query, prompt), self.ends)
                items.append(self._item(parts))
            except (RequestError, PromptError) as error:
                raise RequestError(f"item {i}: {error}") from error
        return items

    def plain(self, body: Any) -> tuple[list[Item | RequestError], bool]:
        """One item as an object, or {"items": [...]}; whether it was a list. A bad item of a list is an error in its
        place; a bad single one is raised."""
        if isinstance(body, dict) and "items" in body:
            if set(body) != {"items"} or not isinstance(body["items"], list):
                raise RequestError('several items are sent as {"items": [...]} and nothing else')
            self._check_number(len(body["items"]))
            items: list[Item | RequestError] = []
            for i, one in enumerate(body["items"]):
                try:
                    items.append(self._plain(one))
                except RequestError as error:
                    items.append(RequestError(f"item {i}: {error}"))
            return items, True
        return [self._plain(body)], False

    def _plain(self, one: Any) -> Item:
        if not isinstance(one, dict):
            raise RequestError(f"an item is an object with instruction and response, not {type(one).__name__}")
        unknown = sorted(set(one) - {*ITEM_KEYS, _WEIGHTS})
        if unknown:
            raise RequestError(f"an item has no {unknown[0]!r}; it has {', '.join((*ITEM_KEYS, _WEIGHTS))}")
        for name in ("instruction", "response"):
            if not isinstance(one.get(name), str):
                raise RequestError(f"the {name} must be a text, got {type(one.get(name)).__name__}")
        weights = one.get(_WEIGHTS)
        if weights is not None and not isinstance(weights, dict):
            raise RequestError("weights must be an object of dimension to number")
        return self._item({key: value for key, value in one.items() if key != _WEIGHTS}, weights)

    def _item(self, parts: dict[str, Any], weights: Mapping[str, float] | None = None) -> Item:
        if parts.get("rubric") in (None, "", {}):
            parts["rubric"] = self.rubric
        return Item(parts={key: value for key, value in parts.items() if value is not None}, weights=weights)

    def _label(self, label: Any) -> dict[str, Any]:
        if self.labels == UNUSED or label is None or label == "":
            return {}
        if self.labels == PARTS and isinstance(label, str):
            try:
                label = json.loads(label)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"with --labels {PARTS} a label is a JSON object: {error}") from error
        if isinstance(label, dict):
            unknown = sorted(set(label) - set(LABEL_KEYS))
            if unknown:
                raise RequestError(f"a label has no part {unknown[0]!r}; it may have {', '.join(LABEL_KEYS)}")
            return {key: value for key, value in label.items() if value is not None}
        if self.labels == PARTS or isinstance(label, (list, bool)):
            raise RequestError(
                f"a label must be {'a JSON object' if self.labels == PARTS else 'a text'}, got {label!r}"
            )
        return {"reference": str(label)}

    def _check_number(self, n: int) -> None:
        if not 0 < n <= self.max_items:
            raise RequestError(f"{n} items in one request; 1 to {self.max_items} are taken (--max_items)", 413)
