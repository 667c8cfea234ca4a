"""The prompt as it leaves the data set: token ids, label, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """token_ids: the prompt as the engine gets it. label: the human score. row: its index in the data set."""

    token_ids: tuple[int, ...]
    label: float
    row: int
    text: str
