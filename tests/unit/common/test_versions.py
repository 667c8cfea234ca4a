from __future__ import annotations

import logging
import re
from importlib import metadata
from pathlib import Path

import pytest

from real_openrlhf.common import versions
from real_openrlhf.common.versions import KNOWN, Known, outside, table, warn_of_versions

ROOT = Path(__file__).parents[3]
LIBRARY = Known(
    name="Lib", packages=("lib", "lib-cpu"), tested=("1.2.0", "1.4"), expected=">=1.2,<2", broken="<1", why="no door"
)


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [
        ({"lib": "1.2.0"}, None),
        ({"lib-cpu": "1.2.0+cpu"}, None),
        ({"lib": "1.4.0"}, None),
        ({"lib": "1.3.0rc1"}, None),
        ({}, None),
        (
            {"lib": "0.9"},
            "Lib 0.9 does not work with this package (no door); this package was tested with 1.2.0 and 1.4",
        ),
        ({"lib": "2.0"}, "Lib 2.0 is untried; this package was tested with 1.2.0 and 1.4"),
        ({"lib": "1.1", "lib-cpu": "1.2.0"}, "Lib 1.1 is untried"),
        ({"lib": "main"}, "Lib main: a version that cannot be read"),
    ],
)
def test_what_is_said_of_a_version(
    installed: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "KNOWN", (LIBRARY,))
    got = outside(installed=version)
    assert len(got) == (wanted is not None) and all(message.startswith(wanted or "") for message in got)
    assert outside(["Other"], installed=version) == []


def test_this_environment_is_in_the_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_versions()
    assert caplog.messages == []


def test_the_page_has_the_table() -> None:
    page = (ROOT / "real_openrlhf/dropin/README.md").read_text(encoding="utf-8")
    assert table() in page, "paste what python -m real_openrlhf.common.versions prints"


@pytest.mark.parametrize("script", ["setup.py", "examples/install/cpu.sh"])
def test_what_is_installed_has_been_tested(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    pins = dict(re.findall(r"([a-z-]+)(?:\[\w+\])?==([\d.]+\d)", text))
    tested = {package: known.tested for known in KNOWN for package in known.packages}
    assert "openrlhf" in pins
    assert {name: v for name, v in pins.items() if name in tested and v not in tested[name]} == {}
