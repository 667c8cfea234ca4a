"""Turns a raw prompt (a string or chat messages) into the text and the token ids that the engine gets."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from jinja2 import TemplateError as JinjaError

from real_openrlhf.data.literal import BREAK, encode_literal, literal
from real_openrlhf.data.row import DataError, shorten

logger = logging.getLogger(__name__)
SLOT = "{}"


class ChatTokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that are used to make prompts."""

    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any: ...


class TemplateError(DataError):
    """The template cannot be used at all: its flags contradict each other, or the tokenizer does not fit."""


class PromptError(DataError):
    """One prompt cannot be rendered; the message says why, the caller adds file, row and column."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How raw prompts become token ids.

    input_template       text with exactly one "{}", which a string prompt replaces (other braces stay as they are);
                         None: the string as it is. With a chat template the result is the user's message.
    apply_chat_template  render with the tokenizer's chat template; a string counts as one user message
    enable_thinking      passed to the chat template when not None
    """

    input_template: str | None = None
    apply_chat_template: bool = False
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        template = self.input_template
        if template is not None and template.count(SLOT) != 1:
            raise TemplateError(
                f"--data.input_template must contain exactly one {SLOT!r} where the prompt goes, but "
                f"{shorten(template)} has {template.count(SLOT)}"
            )
        if template is not None and "\\n" in template:
            logger.warning(
                "--data.input_template %s holds a backslash and an n, not a line break; in bash write $'...\\n...'",
                shorten(template),
            )
        if self.enable_thinking is not None and not self.apply_chat_template:
            raise TemplateError("enable_thinking is an option of the chat template; pass --data.apply_chat_template")

    @property
    def sha256(self) -> str:
        """Hash of the settings. The chat template itself belongs to the tokenizer and is not part of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check(self, tokenizer: ChatTokenizer) -> None:
        """Raise TemplateError when the tokenizer does not have what this template needs."""
        if self.apply_chat_template and not tokenizer.chat_template:
            raise TemplateError(
                "--data.apply_chat_template is set, but the tokenizer has no chat template; use an instruction-tuned "
                "model's tokenizer, or drop the flag and write the prompt's form into --data.input_template"
            )

    def render(
        self, tokenizer: ChatTokenizer, raw: object, *, literally: bool | None = None
    ) -> tuple[str, tuple[int, ...]]:
        """The prompt's text and token ids, ready for generation.

        raw: a string, or a list of {"role": str, "content": str}.
        literally: special tokens that raw spells out ("<|im_end|>") become plain text and cannot end a turn. None: this
        holds if a template is used; a string without any template is a finished prompt, special tokens included.

        Raises PromptError if this prompt is wrong, TemplateError if no prompt can be rendered.
        """
        self.check(tokenizer)
        if literally is None:
            literally = self.apply_chat_template or self.input_template is not None
        if isinstance(raw, str):
            if not raw.strip():
                raise PromptError("the prompt is empty")
            text = _literal(tokenizer, raw) if literally else raw
            text = text if self.input_template is None else self.input_template.replace(SLOT, text)
            messages = [{"role": "user", "content": text}]
        elif isinstance(raw, Sequence) and not isinstance(raw, (bytes, bytearray)):
            messages = _messages(raw)
            if literally:
                messages = [{**m, "content": _literal(tokenizer, m["content"])} for m in messages]
            if not self.apply_chat_template:
                raise PromptError("the prompt is a list of chat messages; pass --data.apply_chat_template to render it")
            if self.input_template is not None:
                raise PromptError(
                    "the prompt is a list of chat messages, which --data.input_template cannot wrap; drop that flag"
                )
        else:
            raise PromptError(f"a prompt is a string or a list of chat messages, not {_kind(raw)} {shorten(raw)}")
        if self.apply_chat_template:
            text = self._chat(tokenizer, messages)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half a surrogate pair, which tokenizers refuse.
            raise PromptError(f"the prompt is not valid Unicode: {error.reason} at {error.start}") from error
        # The chat template already writes BOS.
        encode = _encode_bare if self.apply_chat_template else _encode_plain
        ids = encode_literal(partial(encode, tokenizer), tokenizer, text)
        if not ids:
            raise PromptError(f"the tokenizer makes no tokens from {shorten(text)}")
        return text.replace(BREAK, ""), tuple(ids)

    def _chat(self, tokenizer: ChatTokenizer, messages: list[dict[str, Any]]) -> str:
        options = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except (JinjaError, ValueError, TypeError, KeyError) as error:
            # Templates refuse unknown forms, such as a system message or two user turns in a row.
            raise PromptError(f"the tokenizer's chat template refuses the messages: {error}") from error
        return str(text)


def _literal(tokenizer: ChatTokenizer, text: str) -> str:
    try:
        return literal(tokenizer, text)
    except ValueError as error:
        raise PromptError(str(error)) from error


def _encode_bare(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _encode_plain(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids with the special tokens that the tokenizer adds in front, each once, and without those it adds at the end."""
    ids = list(tokenizer.encode(text, add_special_tokens=True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = bos is not None and ids[:2] == [bos, bos]
    ended = eos is not None and ids[-1:] == [eos]
    if doubled or ended:
        bare = list(tokenizer.encode(text, add_special_tokens=False))
        # Only tokens that the tokenizer added are removed; a special token that the text itself spells out stays.
        while eos is not None and _trailing(ids, eos) > _trailing(bare, eos):
            ids.pop()
        if doubled and bare[:1] == [bos] and bare[:2] != [bos, bos]:
            ids.pop(0)
    return ids


def _trailing(ids: Sequence[int], token: int) -> int:
    count = 0
    while count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count


def _messages(raw: Sequence[object]) -> list[dict[str, Any]]:
    if not raw:
        raise PromptError("the list of chat messages is empty")
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(raw):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"message {i} is {_kind(message)}, not an object with 'role' and 'content': {shorten(message)}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PromptError(f"message {i} needs a text {key!r}, but has {shorten(message.get(key))}")
        messages.append(dict(message))
    if messages[-1]["role"] == "assistant":
        raise PromptError("the last message is the assistant's; a prompt ends before the answer")
    if not any(message["content"].strip() for message in messages):
        raise PromptError("the prompt is empty")
    return messages


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
