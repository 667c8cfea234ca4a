"""Vicuna Bench."""

from __future__ import annotations

from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.builders.prometheus import reader

BUILDER = Builder(
    name="vicuna_bench",
    about="Vicuna Bench: 80 prompts, 320 responses, the mean of three GPT-4 scores",
    read=reader("vicuna_bench"),
    scale="1-5",
    template="source",
)
