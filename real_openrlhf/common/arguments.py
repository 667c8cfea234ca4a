"""What every command line of the package does alike."""

from __future__ import annotations

import argparse
import re
from typing import TypeVar

P = TypeVar("P", bound=argparse.ArgumentParser)


def take_negative_values(parser: P) -> P:
    """A word such as -5-5 or -1,0,1 is a value, as -5 is to argparse: no flag begins with a digit."""
    parser._negative_number_matcher = re.compile(r"-[0-9.]")
    return parser
