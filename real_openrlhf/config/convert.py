"""A configuration as a nested dict, and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from real_openrlhf.common.paths import expand
from real_openrlhf.config.flags import ConfigError, Flag, all_flags, check_value, describe, subsections
from real_openrlhf.config.other_names import other_name
from real_openrlhf.config.schema import Config
from real_openrlhf.config.unsupported import why_unsupported

# Keys of configurations that earlier versions wrote, with the values that say nothing.
_FORMER = {"logger.wandb.key": (None, "<redacted>")}


@cache
def flags_by_name() -> dict[str, Flag]:
    return {item.name: item for item in all_flags(Config)}


def get_value(config: Any, name: str) -> Any:
    """The value of a flag: get_value(config, "actor.adam.lr")."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def build_config(values: Mapping[str, Any], *, overridden: Iterable[str] = ()) -> Config:
    """A configuration from flag names and values of the right type; what is left out keeps its default."""
    config: Config = _build(Config, "", values, {"overridden": tuple(overridden)})
    return config


def _build(cls: type, prefix: str, values: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    arguments = dict(more)
    for f in dataclasses.fields(cls):
        if prefix + f.name in values:
            arguments[f.name] = values[prefix + f.name]
    for name, section in subsections(cls).items():
        arguments[name] = _build(section, f"{prefix}{name}.", values, {})
    return cls(**arguments)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested, JSON-able; tuples are lists."""
    nested: dict[str, Any] = {}
    for name in flags_by_name():
        value = get_value(config, name)
        *path, last = name.split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = list(value) if isinstance(value, tuple) else value
    nested["overridden"] = list(config.overridden)
    return nested


def config_from_dict(nested: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_dict`. No preset is applied.

    Raises ConfigError for unknown keys and wrong values, all of them.
    """
    nested = dict(nested)
    overridden = nested.pop("overridden", ())
    return build_config(values_of_mapping(nested, source="the configuration"), overridden=overridden)


def values_of_mapping(nested: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Flag name -> value, from nested or dotted keys. source: what messages call it.

    Raises ConfigError for unknown keys and wrong values, all of them.
    """
    known = flags_by_name()
    sections = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    values: dict[str, Any] = {}
    wrong: list[str] = []

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in values:
                wrong.append(f"{source} gives {name} twice")
            elif name in known:
                try:
                    values[name] = coerce(known[name], value, source=source)
                except ConfigError as error:
                    wrong.append(str(error))
            elif name in _FORMER and value in _FORMER[name]:
                continue
            elif name in sections and isinstance(value, Mapping):
                walk(value, name + ".")
            elif name in sections:
                wrong.append(f"{source}: {name} is a section, it needs keys below it, got {value!r}")
            else:
                reason = why_unsupported(name)
                found = other_name(name) or (reason and f"this flag of OpenRLHF is not used here: {reason}")
                hint = f": {found}" if found else nearest(name, [*known, *sections])
                wrong.append(f"{source} has the unknown key {name!r}{hint}")

    walk(nested, "")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return values


def coerce(item: Flag, value: Any, *, source: str = "") -> Any:
    """A value as JSON, YAML or a command line gives it, in the flag's type. Raises ConfigError."""
    start = f"{source}: " if source else ""
    if value is None or (item.optional and value == "none"):
        result = None
    elif item.many:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        result = tuple(_coerce_one(item, v, start) for v in items)
    else:
        result = _coerce_one(item, value, start)
    try:
        check_value(item, result)
    except ConfigError as error:
        raise ConfigError(f"{start}{error}") from None
    return result


def _coerce_one(item: Flag, value: Any, start: str) -> Any:
    wrong = ConfigError(f"{start}--{item.name} must be {describe(item)}, got {value!r}")
    if item.kind is bool:
        result = {"true": True, "false": False}.get(str(value).lower())
        if result is None:
            raise wrong
        return result
    # A command line gives text, and a file may have put a number in quotes: text that is a number is one.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    if item.kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{wrong}; put it in quotes")
        if item.path and item.optional and not value.strip():
            raise ConfigError(f"{start}--{item.name} is blank; give a path, or none")
        return expand(value) if item.path else value
    try:
        number = float(value)
        if item.kind is float:
            return number
        return int(value) if isinstance(value, str) else _whole(number)
    except (ValueError, OverflowError):  # a whole number of hundreds of digits overflows
        raise wrong from None


def _whole(number: float) -> int:
    if not math.isfinite(number) or number != int(number):
        raise ValueError
    return int(number)


def nearest(name: str, known: Iterable[str], *, start: str = "") -> str:
    """ "; did you mean ...?" with up to three names that look like `name`, or nothing.

    Flat names ("n_samples_per_prompt") are compared with the last parts as well. start: what is written before a name.
    """
    known = list(known)
    tail = name.rpartition(".")[2]
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    found += [k for k in known if k.rpartition(".")[2] == tail and "." in k]
    found += [k for k in known if k.replace(".", "_") == name]
    found += difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not found:
        by_tail = {k.rpartition(".")[2]: k for k in known}
        found = [by_tail[t] for t in difflib.get_close_matches(tail, by_tail, n=1, cutoff=0.8)]
    names = [start + name for name in dict.fromkeys(found)][:3]
    return f"; did you mean {' or '.join(names)}?" if names else ""
