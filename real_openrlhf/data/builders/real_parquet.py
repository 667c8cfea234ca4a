"""The parquet files that the paper's authors publish (hub id yasiz/real_data): RL, benchmarks, and the SFT set.

Columns: `prompt` (chat messages), `reward_model.ground_truth` (the label) and `extra_info` (`split`, `index`, in the
SFT set `answer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import Builder, FieldError, Item, Options, get, group_of, label
from real_openrlhf.data.builders.prometheus import asked, parts_of
from real_openrlhf.data.row import shorten

LABEL = "reward_model.ground_truth"


def read(values: Mapping[str, Any], options: Options) -> Item:
    messages = get(values, "prompt")
    said = isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages)
    if not said or not isinstance(messages[-1].get("content"), str):
        raise FieldError("prompt", f"expected chat messages with 'role' and 'content', got {shorten(messages)}")
    extra = values.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise FieldError("extra_info", f"expected an object, got {shorten(extra)}")
    parts = parts_of(messages[-1]["content"])
    answer = extra.get("answer")
    index, split = extra.get("index"), extra.get("split")
    meta = {key: extra[key] for key in ("index", "original_idx") if isinstance(extra.get(key), (str, int))}
    if isinstance(values.get("data_source"), str):
        meta["data_source"] = values["data_source"]
    return Item(
        id=None if index is None else str(index),
        label=label(values, options.label_key or LABEL, options.scale),
        group=f"real:{group_of(asked(messages))}",
        whole=messages,
        parts=parts,
        split=split if isinstance(split, str) else None,
        critique=answer if isinstance(answer, str) and answer.strip() else None,
        meta=meta,
    )


BUILDER = Builder(
    name="real_parquet",
    about="the authors' published parquet files: prompt, reward_model.ground_truth, extra_info",
    read=read,
    scale="1-5",
    template="source",
    fractions={"train": 1.0},
    critiques=True,
)
