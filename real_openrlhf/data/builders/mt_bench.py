"""MT Bench in Prometheus's form."""

from __future__ import annotations

from real_openrlhf.data.builders.base import Builder
from real_openrlhf.data.builders.prometheus import reader

BUILDER = Builder(
    name="mt_bench",
    about="MT Bench in Prometheus's form: 80 prompts of several turns, 320 responses, the mean of the GPT-4 scores",
    read=reader("mt_bench"),
    scale="1-5",
    template="source",
)
