"""The table of what becomes of OpenRLHF's flags, against OpenRLHF's source, the adapter's defaults and the parser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.convert import flags_by_name
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.openrlhf_args import _OPENRLHF_DEFAULTS
from real_openrlhf.config.openrlhf_table import openrlhf_flags, openrlhf_table, other_names_table
from tests.unit.config import test_cli as by_hand

README = Path(__file__).parents[3] / "real_openrlhf/dropin/README.md"


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    return {first.strip("`").removeprefix("--"): rest for first, *rest in cells}


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("openrlhf")


def test_the_page_has_the_tables() -> None:
    page = README.read_text(encoding="utf-8")
    assert openrlhf_table() in page, "paste what python -m real_openrlhf.config.openrlhf_table prints"
    assert other_names_table() in page, "paste what python -m real_openrlhf.config.openrlhf_table prints"


def test_every_flag_of_openrlhf_has_its_row() -> None:
    assert {flag.name for flag in openrlhf_flags()} == by_hand.openrlhf_flags()
    names = set(rows(openrlhf_table()))
    stars = tuple(name[:-1] for name in names if name.endswith("*"))
    assert stars and len(names) > 100
    assert {f.name for f in openrlhf_flags() if f.name not in names and not f.name.startswith(stars)} == set()


def test_defaults_are_openrlhfs() -> None:
    """By hand for some; for what we do not have, as the adapter hands it on, but for what REAL needs otherwise."""
    defaults = {flag.name: flag.default for flag in openrlhf_flags()}
    by_hand = {
        "actor.adam.lr": "1e-06",
        "critic.adam.lr": "9e-06",
        "actor.adam.betas": "0.9 0.95",
        "algo.kl.init_coef": "0.01",
        "data.max_samples": "100000000",
        "ckpt.best_metric_key": None,
        "vllm.num_engines": None,
        "vllm.enable_sleep": "False",
        "logger.wandb.run_name": "made at start",
    }
    assert {name: defaults[name] for name in by_hand} == by_hand

    def text(value: object) -> str | None:
        return " ".join(map(str, value)) if isinstance(value, tuple) else None if value is None else str(value)

    handed_on = {name: text(value) for name, value in _OPENRLHF_DEFAULTS.items()}
    assert {name for name, value in handed_on.items() if value != defaults[name]} == {
        "algo.advantage.estimator",
        "algo.advantage.is_correction_mode",
        "algo.kl.unbiased_gradient",
    }


def test_what_the_last_column_says_holds() -> None:
    table, ours = rows(openrlhf_table()), flags_by_name()
    for name, (_, here) in table.items():
        if here.startswith("not used"):
            with pytest.raises(ConfigError, match="is not used here"):
                parse_args([f"--{name.replace('*', 'x')}=1"])
            continue
        assert name in ours
        said = re.search(r"default (?:`(.*?)`|none)", here)
        if said and said[1] is not None:
            assert parse_args([f"--{name}", *said[1].split()]) is not None
    assert table["ds.param_dtype"][1].endswith("not fp16")
    with pytest.raises(ConfigError, match=r"ds\.param_dtype"):
        parse_args(["--ds.param_dtype", "fp16"])
    assert table["actor.adam.lr"] == ["`1e-06`", "the same"]
    assert table["actor.adam.weight_decay"] == ["`0.0`", "the same, default `0.1`"]
    assert table["actor.model_name_or_path"] == ["none", "the same, required"]


def test_other_names() -> None:
    table = rows(other_names_table())
    assert table["pretrain"] == ["`--actor.model_name_or_path`"]
    assert table["critic_pretrain"][0].startswith("REAL has no critic")
    assert len(table) > 150
