"""FLASK."""

from __future__ import annotations

from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.builders.prometheus import reader

BUILDER = Builder(
    name="flask",
    about="FLASK: 200 prompts with 12 rubrics, labels from GPT-4 (--label_key human_score: from people)",
    read=reader("flask"),
    scale="1-5",
    template="source",
)
