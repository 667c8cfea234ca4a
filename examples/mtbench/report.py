"""The tables and learning curves of this example, made again from the JSON files of its cells.

python -m examples.mtbench.report examples/mtbench/results/cpu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.methods.tables import write_tables
from examples.mtbench.study import EXAMPLE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the results of one size")
    print(write_tables(EXAMPLE, parser.parse_args(argv).folder))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"report: {error}")
