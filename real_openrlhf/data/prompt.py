"""A prompt as the data set gives it: token ids, label, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, ready for an engine.

    token_ids  the prompt as the engine gets it
    label      the human score; NaN where there is none, as when a judge is used
    row        its index in the data set
    given_ids  first tokens of the response, which the engine continues. Empty in training.
    judged_ids tokens of the response that is to be judged; None where the data do not name it
    """

    token_ids: tuple[int, ...]
    label: float
    row: int
    text: str
    given_ids: tuple[int, ...] = ()
    judged_ids: tuple[int, ...] | None = None
