"""The tables and learning curves of an example, made again from the JSON files of its cells; no model is needed.

python -m examples.methods.report stsb examples/stsb/results/cpu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.methods.run import EXAMPLES, load_example
from examples.methods.tables import write_tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    parser.add_argument("folder", type=Path, help="the results of one size")
    args = parser.parse_args(argv)
    print(write_tables(load_example(args.example), args.folder))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"report: {error}")
