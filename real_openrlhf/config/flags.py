"""Sections of flags as dataclasses, and the view of them that parsers and tables use.

A field made with `flag(...)` carries its help and its bounds; `Section.__post_init__` checks them,
so that a section that holds an impossible value cannot exist. The flag's name is the field's path
in `Config`: `config.actor.adam.lr` is `--actor.adam.lr`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

_COMPARE = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


class ConfigError(ValueError):
    """A flag, a configuration file or a combination of flags that cannot be run."""


def flag(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    required: bool = False,
    path: bool = False,
) -> Any:
    """A dataclass field that is a flag. Bounds hold for every number in a tuple; None is always allowed
    where the type allows it. required: "" means missing. path: ~ is the home folder."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        "choices": choices,
        "metavar": metavar,
        "required": required,
        "path": path,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag. kind: int, float, str or bool, of the value or, with `many`, of each of its items.

    length: how many items a tuple has; None: one or more. optional: None is a value.
    """

    name: str
    kind: type
    optional: bool
    many: bool
    length: int | None
    choices: tuple[str, ...]
    default: Any
    help: str
    bounds: dict[str, float]
    metavar: str | None
    required: bool
    path: bool


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the sections. prefix: what stands before the field's name in the flag."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        cls: type = type(self)
        for item in section_flags(cls):
            check_value(item, getattr(self, item.name.rpartition(".")[2]))

    def reject(self, name: str, message: str) -> typing.NoReturn:
        raise ConfigError(f"--{self.prefix}.{name} {message}")


@cache
def section_flags(cls: type) -> tuple[Flag, ...]:
    """The flags of one section, its subsections left out."""
    hints = typing.get_type_hints(cls)
    prefix = getattr(cls, "prefix", "")
    flags = []
    for f in dataclasses.fields(cls):
        if "help" in f.metadata:
            flags.append(_flag_of(f, f"{prefix}.{f.name}" if prefix else f.name, hints[f.name]))
    return tuple(flags)


@cache
def subsections(cls: type) -> dict[str, type]:
    """Field name -> dataclass, for the fields that are sections themselves."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}


def all_flags(cls: type) -> Iterator[Flag]:
    """Every flag of a configuration class, depth first, in the order of its fields."""
    yield from section_flags(cls)
    for section in subsections(cls).values():
        yield from all_flags(section)


def _flag_of(f: dataclasses.Field[Any], name: str, hint: Any) -> Flag:
    optional, hint = _strip_none(hint)
    many, length, choices = False, None, tuple(f.metadata["choices"])
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        many, length = True, None if items[-1] is Ellipsis else len(items)
        hint = items[0]
    if typing.get_origin(hint) is Literal:
        choices, hint = typing.get_args(hint), str
    shown = {key: f.metadata[key] for key in ("help", "bounds", "metavar", "required", "path")}
    return Flag(
        name=name,
        kind=hint,
        optional=optional,
        many=many,
        length=length,
        choices=choices,
        default=f.default,
        **shown,
    )


def _strip_none(hint: Any) -> tuple[bool, Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        assert len(rest) == 1, f"a flag's type is one type or None, not {hint}"
        return True, rest[0]
    return False, hint


def check_value(item: Flag, value: Any) -> None:
    """Raise ConfigError unless `value` has the flag's type, lies in its bounds and is among its choices."""
    if value is None:
        if not item.optional:
            raise ConfigError(f"--{item.name} must be {describe(item)}, got None")
        return
    values = value if item.many else (value,)
    if item.many and (not isinstance(value, tuple) or not value or (item.length or len(value)) != len(value)):
        raise ConfigError(f"--{item.name} must be {describe(item)}, got {value!r}")
    accepted = (int, float) if item.kind is float else item.kind
    for v in values:
        typed = isinstance(v, accepted) and (item.kind is bool or not isinstance(v, bool))
        if not typed or (item.kind is float and not math.isfinite(v)) or not _allowed(item, v):
            raise ConfigError(f"--{item.name} must be {describe(item)}, got {v!r}")


def _allowed(item: Flag, value: Any) -> bool:
    if item.choices and value not in item.choices:
        return False
    return all(_COMPARE[name](value, bound) for name, bound in item.bounds.items())


def describe(item: Flag) -> str:
    """What the flag takes, for messages: "a number >= 0 and < 1", "one of a, b"."""
    noun = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[item.kind]
    if item.choices:
        noun = "one of " + ", ".join(item.choices)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = " and ".join(f"{signs[name]} {bound}" for name, bound in item.bounds.items())
    text = f"{noun} {bounds}".strip()
    if item.many:
        text = f"{item.length} values, each {text}" if item.length else f"one or more values, each {text}"
    return f"{text}, or none" if item.optional else text
