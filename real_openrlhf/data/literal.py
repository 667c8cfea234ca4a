"""Text from outside, encoded so that the special tokens that it spells out are plain text.

A response that is judged may hold "<|im_end|>". Encoded as it is, that closes the user's turn, and
what follows speaks with the judge's own voice. `literal` takes such strings apart, and
`encode_literal` encodes the parts one by one: the same characters, but no special token. A text
without such strings keeps its ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

# Stands where a string was taken apart. A Unicode noncharacter: never in text that is exchanged.
BREAK = "\ufdd0"
# Per tokenizer: the chat template that it was made for, and the pattern of its control strings.
_patterns: WeakKeyDictionary[Any, tuple[str, re.Pattern[str] | None]] = WeakKeyDictionary()


def control_strings(tokenizer: Any) -> frozenset[str]:
    """What the tokenizer would turn into a special token, or into a token of the chat template's own.

    Other added tokens (runs of spaces, say) stay tokens. So do words of a template that are no tokens
    ("[INST]" of some models): there the response and the template are made of the same tokens.
    """
    template = _template(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special or token.content in template}
    found |= set(getattr(tokenizer, "all_special_tokens", ()))
    return frozenset(text for text in found if len(text) > 1 and not text.isspace())


def literal(tokenizer: Any, text: str) -> str:
    """The text with a BREAK inside of every control string; ValueError if it holds one already."""
    if BREAK in text:
        raise ValueError(f"the text holds the character U+{ord(BREAK):04X}, which is not for exchange; take it out")
    template, pattern = _patterns.get(tokenizer, (None, None))
    if template != _template(tokenizer):
        strings = sorted(control_strings(tokenizer), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, strings))) if strings else None
        _patterns[tokenizer] = (_template(tokenizer), pattern)
    # Again, until nothing is found: strings may overlap.
    while pattern is not None and (broken := pattern.sub(_broken, text)) != text:
        text = broken
    return text


def encode_literal(encode: Callable[[str], list[int]], tokenizer: Any, text: str) -> list[int]:
    """The ids of a text with BREAKs. encode: how the first part is encoded, or all without a BREAK."""
    first, *rest = text.split(BREAK)
    ids = list(encode(first))
    for part in rest:
        ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def _template(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "chat_template", None) or "")


def _broken(match: re.Match[str]) -> str:
    return match[0][: len(match[0]) // 2] + BREAK + match[0][len(match[0]) // 2 :]
