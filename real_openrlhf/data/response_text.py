"""The response within a text that begins with its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from real_openrlhf.data.template import PromptError


def response_of(query: str, prompt: str) -> str:
    """What follows the prompt in the query. PromptError where the prompt does not stand in it.

    Decoding may change the spaces of a prompt and put special tokens before it, so spaces are left out of the
    comparison. A prompt may hold the answer anchor itself: what is searched must be the response alone.
    """
    place = [i for i, character in enumerate(query) if not character.isspace()]
    wanted = "".join(prompt.split())
    start = "".join(query[i] for i in place).find(wanted)
    if start < 0 or not wanted:
        raise PromptError(
            f"the prompt that begins {prompt[:60]!r} does not stand in the text that came back, so it cannot be told "
            "from the response. Either it was cut (raise --data.max_len) or this tokenizer does not give its text back"
        )
    return query[place[start + len(wanted) - 1] + 1 :]


def without_end(text: str, ends: Sequence[str]) -> str:
    """The text without the given texts at its end, however many stand there: "good.</s></s>" -> "good."."""
    found = True
    while found:
        found = False
        for end in ends:
            if end and text.endswith(end):
                text, found = text.removesuffix(end), True
    return text
