"""`python -m real_openrlhf.judge`: rows in, scores out.

python -m real_openrlhf.judge --model FOLDER --input rows.jsonl --output scores.jsonl
python -m real_openrlhf.judge serve --model FOLDER --port 8000
python -m real_openrlhf.judge serve --rewards --model FOLDER --port 8001
python -m real_openrlhf.judge calibration fit --model FOLDER --data scores.jsonl
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from real_openrlhf.common.errors import RunError
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.model_name import check_model
from real_openrlhf.common.quiet_imports import quiet_imports
from real_openrlhf.judge.cli_args import FIT, REWARDS, SCORE, SERVE, check, parse_args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the engine or the server failed, 2 the input is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        check(args)
        use_writable_caches()
        # A server has the model, and a calibration is of scores that are there: the tokenizer is enough.
        check_model(args.model, "--model", needs_config=args.command != FIT and not getattr(args, "server", None))
        _run(args)
    except (ValueError, RunError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1 if isinstance(error, RunError) else 2
    return 0


def _run(args: argparse.Namespace) -> None:
    quiet_imports()
    # Here: help and mistakes in flags answer before torch and transformers are imported.
    from real_openrlhf.judge.cli_score import score
    from real_openrlhf.judge.cli_tools import fit, reward_model, serve_model

    {SCORE: score, SERVE: serve_model, REWARDS: reward_model, FIT: fit}[args.command](args)
