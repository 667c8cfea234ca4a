"""Settings that all command lines of the package share."""

from __future__ import annotations

import argparse
import re
from typing import TypeVar

P = TypeVar("P", bound=argparse.ArgumentParser)


def take_negative_values(parser: P) -> P:
    """Make argparse read a word such as -5-5 or -1,0,1 as a value, as it does -5: no flag begins with a digit."""
    parser._negative_number_matcher = re.compile(r"-[0-9.]")
    return parser
