"""A scale may begin below zero, on the command line of every command."""

from __future__ import annotations

import argparse

import pytest

from real_openrlhf import evaluate
from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.data import __main__ as data
from real_openrlhf.judge import cli as judge


@pytest.mark.parametrize("value", ["-5-5", "-1-1", "-5--1", "-1,0,1", "-.5,.5", "-1=Bad,1=Good", "-2"])
@pytest.mark.parametrize("form", ["two words", "one"])
def test_a_scale_below_zero(value: str, form: str) -> None:
    def words(flag: str) -> list[str]:
        return [flag, value] if form == "two words" else [f"{flag}={value}"]

    if value != "-2":  # no scale
        config = parse_args([*words("--real.scale"), "--real.anchor", "a ", "-1 b "])
        assert config.real.scale == value and config.real.score_scale.values[0] < 0
        assert config.real.anchor == ("a ", "-1 b ")
    model = ["--model", "m", *words("--scale")]
    assert evaluate.parse_args(model).scale == value
    assert judge.parse_args([*model, "--input", "i"]).scale == value
    assert judge.parse_args(["serve", *model]).scale == value
    assert judge.parse_args(["calibration", "fit", *model, "--data", "d"]).scale == value
    assert data.parse_args(["generic", "--output_dir", "o", *words("--scale")]).scale == value


def test_flags_are_flags_and_negative_numbers_are_refused_by_their_flag() -> None:
    parser = take_negative_values(argparse.ArgumentParser(exit_on_error=False))
    parser.add_argument("--a", nargs="+")
    parser.add_argument("-b", action="store_true")
    parsed = parser.parse_args(["--a", "-1-1", "-2", "x", "-b"])
    assert parsed.a == ["-1-1", "-2", "x"] and parsed.b
    with pytest.raises(ConfigError, match=r"--actor.adam.lr must be a number >= 0, got -1.0"):
        parse_args(["--actor.adam.lr", "-1"])
    with pytest.raises(ConfigError, match="unknown flag -x"):
        parse_args(["-x"])
