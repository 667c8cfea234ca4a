"""What becomes of OpenRLHF's flags: `python -m real_openrlhf.config.openrlhf_table`; dropin/README.md holds it.

OpenRLHF's flags are read from the source of the installed package, which is not imported.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.config.convert import flags_by_name
from real_openrlhf.config.flags import Flag, describe
from real_openrlhf.config.other_names import all_other_names, other_name
from real_openrlhf.config.unsupported import UNSUPPORTED, why_unsupported

_SOURCE = "cli/train_ppo_ray.py"
_PREFIXES = ("actor", "critic")  # OpenRLHF declares their optimizers' flags in a loop over the two


@dataclass(frozen=True, kw_only=True)
class TheirFlag:
    """A flag of OpenRLHF. default: as text, None for none; choices: () where anything goes; many: several values."""

    name: str
    default: str | None
    choices: tuple[str, ...]
    many: bool


def openrlhf_table() -> str:
    """A row per flag of OpenRLHF, in its order; one for all of a section of which nothing is used."""
    lines = ["| flag of OpenRLHF | its default | here |", "|---|---|---|"]
    for flag in openrlhf_flags():
        section = next((key for key in UNSUPPORTED if key.endswith(".") and flag.name.startswith(key)), None)
        name, default = (flag.name, _code(flag.default)) if section is None else (f"{section}*", "")
        lines.append(f"| `--{name}` | {default} | {_cell(_becomes(flag))} |")
    return "\n".join(dict.fromkeys(lines))


def other_names_table() -> str:
    """A row per flag of OpenRLHF's earlier versions and of TRL."""
    lines = ["| flag | here |", "|---|---|"]
    for name in all_other_names():
        answer = (other_name(name) or "").removeprefix("here this is ")
        answer = answer.removeprefix("this flag of OpenRLHF or TRL has no counterpart here: ")
        lines.append(f"| `--{name}` | {_cell(answer)} |")
    return "\n".join(lines)


def openrlhf_flags() -> tuple[TheirFlag, ...]:
    """Those of openrlhf.cli.train_ppo_ray. ModuleNotFoundError without OpenRLHF."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("openrlhf is not installed; bash examples/install/cpu.sh installs it")
    source = Path(next(iter(spec.submodule_search_locations))) / _SOURCE
    return tuple({flag.name: flag for flag in _declared(ast.parse(source.read_text(encoding="utf-8")))}.values())


def _declared(tree: ast.AST) -> Iterator[TheirFlag]:
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    for call in sorted(calls, key=lambda node: node.lineno):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "dest" in given:
            continue  # the negative form of a flag that is there already
        first = call.args[0]
        in_loop = isinstance(first, ast.JoinedStr)
        for prefix in _PREFIXES if in_loop else ("",):
            yield TheirFlag(
                name=_text(first, prefix).removeprefix("--"),
                default=_default(given, prefix),
                choices=tuple(ast.literal_eval(given["choices"])) if "choices" in given else (),
                many="nargs" in given,
            )


def _text(node: ast.expr, prefix: str) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else prefix for part in node.values)
    return str(ast.literal_eval(node))


def _default(given: dict[str | None, ast.expr], prefix: str) -> str | None:
    if "default" not in given:
        return "False" if "action" in given else None
    node = given["default"]
    if isinstance(node, ast.IfExp):  # 1e-6 if prefix == "actor" else 9e-6
        node = node.body if prefix == _PREFIXES[0] else node.orelse
    if isinstance(node, ast.BinOp):  # a name with the time in it
        return "made at start"
    if isinstance(node, ast.Call):  # float("inf"), int(1e8)
        value: Any = {"int": int, "float": float}[ast.unparse(node.func)](ast.literal_eval(node.args[0]))
    else:
        value = ast.literal_eval(node)
    if value is None or value == "":
        return None
    return " ".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)


def _becomes(flag: TheirFlag) -> str:
    reason = why_unsupported(flag.name)
    if reason is not None:
        return f"not used: {reason}"
    ours = flags_by_name()[flag.name]
    here = "the same"
    if ours.required:
        here += ", required"
    elif _shown(ours) != _plain(flag.default):
        here += f", default {_code(_shown(ours))}"
    refused = [choice for choice in flag.choices if ours.choices and choice not in ours.choices]
    if refused or flag.many != ours.many:
        here += f"; takes {describe(ours)}" + (f", not {' or '.join(refused)}" if refused else "")
    return here


def _shown(item: Flag) -> str | None:
    values = item.default if isinstance(item.default, tuple) else (item.default,)
    return _plain(None if item.default is None else " ".join(str(value) for value in values))


def _plain(text: str | None) -> str | None:
    """Numbers in one form: 1e-06 and 0.000001 are no difference, neither are 1 and 1.0."""
    if text is None or text == "":
        return None
    words = []
    for word in text.split(" "):
        try:
            words.append(f"{float(word):g}")
        except ValueError:
            words.append(word)
    return " ".join(words)


def _code(text: str | None) -> str:
    return "none" if text is None else f"`{text}`"


def _cell(text: str) -> str:
    text = re.sub(r"--(no-)?[a-z_]+(\.[a-z0-9_]+)+", r"`\g<0>`", text)
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(f"{openrlhf_table()}\n\n{other_names_table()}\n")
