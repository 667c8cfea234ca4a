"""STS-B: two sentences and the mean of several people's scores for their similarity, 0 to 5, mostly fractional.

Feedback for a warm-up is written by rules that do not see the label (`overlap_feedback`). GLUE's copy cannot be used:
its test labels are hidden.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import Builder, Item, Options, Parts, group_of, label, text
from real_openrlhf.data.overlap_feedback import write_feedback

CRITERIA = "semantic similarity"
HUB_ID = "PhilipMay/stsb-multi-mt:en"


def read(values: Mapping[str, Any], options: Options) -> Item:
    """Reads the columns `instruction`, `response`, `criteria` and `score`, or the hub's `sentence1`, `sentence2` and
    `similarity_score`."""
    hub = "sentence1" in values
    first, second = (
        " ".join(text(values, name).split())
        for name in (("sentence1", "sentence2") if hub else ("instruction", "response"))
    )
    criteria = CRITERIA if hub else text(values, "criteria").strip()
    score = label(values, options.label_key or ("similarity_score" if hub else "score"), options.scale)
    rng = random.Random(f"{options.seed}|{first}|{second}")
    return Item(
        label=score,
        # The same group for both orders of a pair.
        group=f"stsb:{group_of(*sorted((first.lower(), second.lower())))}",
        parts=Parts(instruction=first, response=second, rubric=criteria),
        critique=write_feedback(first, second, rng),
        rng=rng,
    )


BUILDER = Builder(
    name="stsb",
    about="STS-B: human similarity of sentence pairs, 0 to 5, with rule-made feedback for a warm-up",
    read=read,
    scale="0-5",
    template="stsb",
    sources=(f"train={HUB_ID}@train", f"dev={HUB_ID}@dev", f"test={HUB_ID}@test"),
    shuffle=True,
    unique=True,
    critiques=True,
)
