"""Encodes text from outside so that special tokens that it spells out become plain text.

A response that is judged may contain "<|im_end|>". Encoded as it is, that would end the user's turn, and the text after
it would look like the judge's own. `literal` divides such strings, and `encode_literal` encodes the parts one by one:
the same characters, but no special token. A text without such strings keeps its ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

# Marks where a string was divided. A Unicode noncharacter, which never occurs in text that is exchanged.
BREAK = "\ufdd0"
# Cache: tokenizer -> its chat template, and the pattern of its control strings for that template.
_patterns: WeakKeyDictionary[Any, tuple[str, re.Pattern[str] | None]] = WeakKeyDictionary()


def control_strings(tokenizer: Any) -> frozenset[str]:
    """Strings that the tokenizer turns into a special token, or into a token that the chat template uses.

    Other added tokens, such as runs of spaces, are not among them. Nor are words of a template that are not single
    tokens ("[INST]" of some models): there, response and template are made of the same tokens.
    """
    template = _template(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special or token.content in template}
    found |= set(getattr(tokenizer, "all_special_tokens", ()))
    return frozenset(text for text in found if len(text) > 1 and not text.isspace())


def literal(tokenizer: Any, text: str) -> str:
    """The text with a BREAK inside every control string; ValueError if it already contains a BREAK."""
    if BREAK in text:
        raise ValueError(f"the text holds the noncharacter U+{ord(BREAK):04X}; remove it")
    template, pattern = _patterns.get(tokenizer, (None, None))
    if template != _template(tokenizer):
        strings = sorted(control_strings(tokenizer), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, strings))) if strings else None
        _patterns[tokenizer] = (_template(tokenizer), pattern)
    # Repeated until nothing is found, since strings may overlap.
    while pattern is not None and (broken := pattern.sub(_broken, text)) != text:
        text = broken
    return text


def encode_literal(encode: Callable[[str], list[int]], tokenizer: Any, text: str) -> list[int]:
    """The ids of a text with BREAKs. encode: encodes the first part, or the whole text if it has no BREAK."""
    first, *rest = text.split(BREAK)
    ids = list(encode(first))
    for part in rest:
        ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def _template(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "chat_template", None) or "")


def _broken(match: re.Match[str]) -> str:
    return match[0][: len(match[0]) // 2] + BREAK + match[0][len(match[0]) // 2 :]
