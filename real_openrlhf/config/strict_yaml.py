"""Reads only YAML that all YAML readers understand alike. Other YAML is refused, with key and line."""

from __future__ import annotations

import re
from typing import Any

from real_openrlhf.config.flags import ConfigError

# Numbers that JSON, YAML 1.1, YAML 1.2 and people understand alike, except that YAML 1.1 takes 1e-6 for text.
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("null", "Null", "NULL")
# Other forms that are numbers in YAML 1.1 or 1.2 only: octal, hexadecimal, binary, base 60, 1_000, infinity.
_ODD_NUMBER = re.compile(
    r"[-+]?(0[0-9_.]+([eE][-+]?[0-9]+)?|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+"
    r"|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[0-9_]*_[0-9_.]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")
_DEEPEST = 50
_WORD = re.compile(r"yes|no|on|off|y|n", re.IGNORECASE)


def load_yaml(text: str, where: str) -> Any:
    """Mappings, lists, text, numbers, true, false and null. where: the file, for messages.

    ConfigError for a key that occurs twice, for merge keys, aliases and tags, and for a value without quotes that is
    text for one reader and something else for another. yaml.YAMLError if it is not YAML.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:  # at once: the time that PyYAML needs grows with the square of the depth
            raise ConfigError(f"{where}, line {line}: is nested more than {_DEEPEST} deep; flags have sections of 3")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{where}, line {line}: has the anchor or alias {event.anchor!r}; write the value out")
        if getattr(event, "tag", None):
            raise ConfigError(f"{where}, line {line}: has the tag {event.tag!r}; leave it out, and put text in quotes")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if root is None else _Reader(text, where).read(root, "")


class _Reader:
    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where

    def read(self, node: Any, path: str) -> Any:
        if node.id == "mapping":
            return self._mapping(node, path)
        if node.id == "sequence":
            return [self.read(item, path) for item in node.value]
        return node.value if node.style else self._plain(node, path)

    def _mapping(self, node: Any, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.id != "scalar":
                raise ConfigError(f"{self.where}, line {line}: a key is the name of a flag, not a list or a mapping")
            name = f"{path}{key.value}"
            if key.value == "<<" and not key.style:
                raise ConfigError(f"{self.where}, line {line}: has a merge key (<<); write the keys out")
            if key.value in result:
                raise ConfigError(f"{self.where} gives {name!r} twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
            result[key.value] = self.read(value, f"{name}.")
        return result

    def _plain(self, node: Any, path: str) -> Any:
        """A value without quotes."""
        value = node.value
        if _NUMBER.fullmatch(value):
            return int(value) if value.lstrip("+-").isdecimal() else float(value)
        if value in _TRUTHS:
            return _TRUTHS[value]
        if value in _NULLS:
            return None
        advice = None
        if value in ("", "~"):
            advice = "write null for none, or a value" if value else "has no value; write null for none, or a value"
        elif _WORD.fullmatch(value):
            advice = "write true or false, or put it in quotes if it is text"
        elif _ODD_NUMBER.fullmatch(value):
            advice = "write it as a plain decimal number, or put it in quotes if it is text"
        elif _DATE.fullmatch(value):
            advice = "some readers take it for a date; put it in quotes"
        elif self._loses_blanks(node):
            advice = "YAML drops the blanks after it; put it in quotes, or remove them"
        if advice is None:
            return value
        shown = f" {value!r}:" if value else ""
        raise ConfigError(f"{self.where}, line {node.start_mark.line + 1}: {path.rstrip('.')}:{shown} {advice}")

    def _loses_blanks(self, node: Any) -> bool:
        blanks = re.match(r"[ \t]*", self.text[node.end_mark.index :])
        assert blanks is not None
        end = node.end_mark.index + blanks.end()
        return bool(blanks[0]) and self.text[end : end + 1] in ("", "\n", "\r")
