"""The page of a run, made of its records: python -m real_openrlhf.report RUN_FOLDER

A run writes it too, with every evaluation and checkpoint and at its end, as report.html in its output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from real_openrlhf.common.paths import expand


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m real_openrlhf.report",
        description="Write one HTML file that shows a run: metrics over the steps, warnings, judgements.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN_FOLDER", help="the --ckpt.output_dir of a run that goes on or is over")
    parser.add_argument("--output", metavar="FILE", help="where to write it; default: report.html in RUN_FOLDER")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the input is wrong."""
    args = parse_args(list(sys.argv[1:] if argv is None else argv))
    # Here: help answers before matplotlib is imported.
    from real_openrlhf.controller.report.page import write_report

    try:
        path = write_report(expand(args.run), None if args.output is None else Path(expand(args.output)))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
