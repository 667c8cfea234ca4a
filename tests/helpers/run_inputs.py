"""A run's inputs from its flags."""

from __future__ import annotations

from real_openrlhf.config.cli import parse_args
from real_openrlhf.run.inputs import Inputs, load_inputs


def inputs_of(flags: list[str], *more: str) -> Inputs:
    return load_inputs(parse_args([*flags, *more]))
