"""Prints all flags of train_real as a Markdown table: `python -m real_openrlhf.config.flag_table`.

config/README.md holds its output.
"""

from __future__ import annotations

import sys

from real_openrlhf.config.convert import flags_by_name
from real_openrlhf.config.flags import Flag, describe


def flag_table() -> str:
    """A row per flag, in the order of the schema."""
    lines = ["| flag | default | takes | what it is |", "|---|---|---|---|"]
    lines += [
        f"| `--{name}` | {_default(item)} | {_cell(describe(item))} | {_cell(item.help)} |" for name, item in _all()
    ]
    return "\n".join(lines)


def _all() -> list[tuple[str, Flag]]:
    return list(flags_by_name().items())


def _default(item: Flag) -> str:
    if item.required:
        return "required"
    values = item.default if isinstance(item.default, tuple) else (item.default,)
    return "none" if item.default is None else f"`{' '.join(str(value) for value in values)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(flag_table() + "\n")
