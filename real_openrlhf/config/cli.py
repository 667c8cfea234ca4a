"""Turns a command line into a resolved configuration: defaults < preset < --config FILE < flags."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.paths import expand
from real_openrlhf.config.convert import (
    build_config,
    coerce,
    config_from_dict,
    config_to_dict,
    flags_by_name,
    nearest,
    values_of_mapping,
)
from real_openrlhf.config.flags import ConfigError, Flag, describe
from real_openrlhf.config.other_names import other_name
from real_openrlhf.config.presets import DEFAULT_PRESET, WARMUP, preset_values
from real_openrlhf.config.schema import Config
from real_openrlhf.config.strict_yaml import load_yaml
from real_openrlhf.config.supervised import is_read, warmup_values
from real_openrlhf.config.unsupported import why_unsupported

__all__ = ["build_parser", "config_from_dict", "config_to_dict", "parse_args", "resolve"]

_EPILOG = (
    "Order of precedence: defaults, the preset (--real.preset), --config, flags; of two, the later one counts. "
    "Booleans take --x, --no-x or --x true|false; 'none' unsets a flag that can be unset."
)

# What word processors make of --.
_LONG_DASHES = ("\u2013", "\u2014")


class _BoolAction(argparse.BooleanOptionalAction):
    """--x, --no-x, and --x true|false, as some scripts write it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nargs = "?"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        negated = (option_string or "").startswith("--no-")
        if negated and values is not None:
            raise ConfigError(f"{option_string} takes no value, got {values!r}")
        setattr(namespace, self.dest, values if values is not None else not negated)

    def format_usage(self) -> str:
        return " | ".join(self.option_strings)


def build_parser(prog: str | None = None, *, warmup: bool = False) -> argparse.ArgumentParser:
    """Values are kept as given (None: not given); `resolve` gives them their types.

    warmup: of train_warmup. Help leaves out the flags that the command does not read; `validate` refuses them.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [flags]",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    take_negative_values(parser)
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="JSON or YAML file of flags, nested or with dotted keys; of several, the later ones have precedence",
    )
    groups: dict[str, Any] = {}
    for name, item in flags_by_name().items():
        head = name.partition(".")[0] if "." in name else ""
        group = groups.setdefault(head, parser.add_argument_group(head) if head and head not in groups else parser)
        _add(
            group,
            item,
            preset_values(WARMUP).get(name, item.default) if warmup else item.default,
            is_read(name, warmup),
        )
    return parser


def _add(group: Any, item: Flag, default: Any, shows: bool) -> None:
    if isinstance(default, tuple):
        default = " ".join(repr(v) if isinstance(v, str) else str(v) for v in default)
    shown = "required" if item.required else f"default: {'none' if default is None else default!s}"
    text = f"{item.help} [{describe(item)}; {shown}]".replace("%", "%%") if shows else argparse.SUPPRESS
    if item.kind is bool:
        group.add_argument(f"--{item.name}", action=_BoolAction, metavar="BOOL", help=text)
        return
    metavar = item.metavar or {int: "N", float: "X", str: "TEXT"}[item.kind]
    # "+" for pairs too, so that the message about a wrong number of values is ours.
    group.add_argument(f"--{item.name}", metavar=metavar, nargs="+" if item.many else None, help=text)


def parse_args(argv: Sequence[str], *, warmup: bool = False) -> Config:
    """Raises ConfigError for unknown flags, values of the wrong type or out of bounds, and bad files.

    Contradictions between flags are left to `validate`. warmup: the flags of train_warmup.
    """
    return resolve(*given_values(argv, warmup=warmup), warmup=warmup)


def given_values(argv: Sequence[str], *, warmup: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command line gives, and what its --config files give: flag name -> typed value. Raises ConfigError."""
    try:
        namespace, rest = build_parser(warmup=warmup).parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(_without_value(error)) from None
    given = vars(namespace)
    paths = given.pop("config", [])
    known = flags_by_name()
    wrong = [_explain(rest, argv)] if rest else []
    explicit = {}
    for name, value in given.items():
        try:
            explicit[name] = coerce(known[name], _many(known[name], value))
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    from_files: dict[str, Any] = {}
    for path in paths:
        from_files.update(read_config_file(path))
    return explicit, from_files


def _many(item: Flag, value: Any) -> Any:
    return "none" if item.many and item.optional and value == ["none"] else value


def resolve(explicit: dict[str, Any], from_file: dict[str, Any] | None = None, *, warmup: bool = False) -> Config:
    """Apply the preset and note what overrides it. explicit, from_file: flag name -> typed value."""
    chosen = {**(from_file or {}), **explicit}
    if warmup:
        chosen = warmup_values(chosen)
    preset = preset_values(chosen.get("real.preset", DEFAULT_PRESET))
    if chosen.get("real.keep_groups") == "all":
        # Without dynamic sampling nothing is refilled; only asking for both explicitly is a contradiction.
        chosen.setdefault("real.refill", False)
    values = {**preset, **chosen}
    overridden = [name for name, value in preset.items() if values[name] != value]
    return build_config(values, overridden=overridden)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Flag name -> typed value from a JSON or YAML file. Raises ConfigError."""
    path = Path(expand(str(path)))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    content = _parse_yaml(text, path) if path.suffix in (".yaml", ".yml") else _parse_json(text, path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config: {path} must hold one mapping of flags to values")
    # Files written by a run record what was overridden; here that is determined again.
    content.pop("overridden", None)
    return values_of_mapping(content, source=f"--config {path}")


def _parse_json(text: str, path: Path) -> Any:
    def no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f"--config {path} gives {key!r} twice")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise ConfigError(f"--config: {path} is not JSON: {error}") from None


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"--config: {path} is YAML, which needs the package pyyaml; or write it as JSON") from None
    try:
        return load_yaml(text, f"--config {path}")
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {error}") from None


def _without_value(error: argparse.ArgumentError) -> str:
    """What to say where a flag stands without a value; argparse finds nothing else wrong with a flag that it knows."""
    text = error.argument_name or ""
    if text == "--config":
        return f"{text} has no value; it must be the path of a JSON or YAML file"
    item = flags_by_name().get(text.lstrip("-"))
    if item is None:
        return f"{text}: {error.message}"
    hint = f"; one that begins with - is joined to it, as in {text}=-x" if item.kind is str and not item.choices else ""
    return f"{text} has no value; it must be {describe(item)}{hint}"


def _explain(rest: Sequence[str], argv: Sequence[str]) -> str:
    """A message about the arguments that the parser did not recognise."""
    unknown = [text.partition("=")[0] for text in rest if text.startswith("-") and not text[1:2].isdigit()]
    if not unknown:
        if rest[0].startswith(_LONG_DASHES):
            meant = rest[0].lstrip("".join(_LONG_DASHES))
            return f"unexpected {shlex.join(rest)}: it begins with a long dash; write --{meant}"
        before = argv[: list(argv).index(rest[0])]
        last = next((text.partition("=")[0] for text in reversed(before) if text.startswith("--")), None)
        where = f" after {last}, which takes one value; quote text with spaces" if last else ""
        return f"unexpected {shlex.join(rest)}{where}"
    messages = []
    for text in unknown:
        name = text.lstrip("-").removeprefix("no-")
        reason, other = why_unsupported(name), other_name(name)
        if reason is not None:
            messages.append(f"{text} is a flag of OpenRLHF that is not used here: {reason}")
            continue
        if other is not None:
            messages.append(f"{text}: {other}")
            continue
        hint = nearest(name, flags_by_name(), start="--")
        messages.append(f"unknown flag {text}{hint}" if hint else f"unknown flag {text}; --help lists all flags")
    return "\n".join(messages)
