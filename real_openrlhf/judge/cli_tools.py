"""The subcommands `serve` and `calibration fit`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.actors.engine.spec import logprobs_mode_for
from real_openrlhf.common.device import Device
from real_openrlhf.data.dataset import read_label
from real_openrlhf.data.sources import BadRow, DataError, lookup, read_rows
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.judge.calibration import METHODS, Calibration
from real_openrlhf.judge.cli_model import add_model, chosen_settings, make_parser
from real_openrlhf.judge.judge import engine_length
from real_openrlhf.judge.resolve_settings import find_settings, make_reader
from real_openrlhf.judge.scoring import room_for_forcing
from real_openrlhf.judge.serve import serve, serve_command
from real_openrlhf.judge.types import RESULT, JudgeError

logger = logging.getLogger(__name__)


def serve_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(" serve", "Starts vLLM's server with what a judge needs. Flags after -- are passed to vLLM.")
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("extra", nargs="*", metavar="-- VLLM_FLAGS")
    parser.set_defaults(run=_serve)
    return parser.parse_args(words)


def _serve(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.model, name="--model")
    settings = find_settings(args.model, tokenizer, chosen_settings(args))
    room = (args.max_new_tokens or settings.max_new_tokens) + room_for_forcing(make_reader(settings, tokenizer))
    command, env = serve_command(
        args.model,
        device=Device.resolve(args.device),
        host=args.host,
        port=args.port,
        max_model_len=engine_length(args.model, room, args.max_model_len),
        logprobs_mode=logprobs_mode_for(settings.temperature, 1.0),
        tensor_parallel_size=args.tensor_parallel_size,
        extra=args.extra,
    )
    serve(command, env)


def fit_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        " calibration fit", "Fits a monotone map from scores to held-out labels and stores it in the model's folder."
    )
    add_model(parser, engine=False)
    add = parser.add_argument
    add("--data", required=True, help="rows with a score and a human label, such as this program's output")
    add("--score_key", default=f"{RESULT}.score", help="column of E[score]")
    add("--label_key", default="label", help="column of the label")
    add("--method", default=METHODS[0], choices=METHODS)
    parser.set_defaults(run=_fit)
    return parser.parse_args(words)


def _fit(args: argparse.Namespace) -> None:
    if not Path(args.model).is_dir():
        raise JudgeError(f"--model {args.model} is not a local folder; the calibration is stored in the model's folder")
    settings = find_settings(args.model, load_tokenizer(args.model, name="--model"), chosen_settings(args))
    scores, labels, without = [], [], 0
    for row in read_rows(args.data):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        column = args.score_key
        try:
            score = lookup(row.values, column)
            if score is None:
                without += 1  # a response without a readable score
                continue
            column = args.label_key
            labels.append(read_label(lookup(row.values, column), settings.scale))
            scores.append(_number(score))
        except KeyError as error:
            raise DataError(f"{row.place}, column {column!r}: {error.args[0]}") from None
        except ValueError as error:
            raise DataError(f"{row.place}, column {column!r}: {error}") from None
    made = Calibration.fit(scores, labels, scale=settings.scale, method=args.method, renormalise=settings.renormalise)
    path = made.save(args.model)
    left_out = f"; {without} rows without a score were left out" if without else ""
    logger.info(
        "%s: %s on %d rows%s, RMSE on these rows %.4f before and %.4f after",
        path,
        made.method,
        made.n,
        left_out,
        made.rmse_before,
        made.rmse_after,
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a score")
    return float(value)
