"""The subcommands `serve`, with and without --rewards, and `calibration fit`."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from real_openrlhf.actors.engine.spec import logprobs_mode_for
from real_openrlhf.common.device import Device
from real_openrlhf.common.versions import ENGINE, warn_of_versions
from real_openrlhf.data.dataset import read_label
from real_openrlhf.data.row import BadRow, DataError, lookup
from real_openrlhf.data.sources import read_rows
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.judge.calibration import Calibration
from real_openrlhf.judge.cli_args import read_key
from real_openrlhf.judge.cli_model import chosen_settings
from real_openrlhf.judge.judge import engine_length
from real_openrlhf.judge.resolve_settings import find_settings, make_reader
from real_openrlhf.judge.scoring import room_for_forcing
from real_openrlhf.judge.serve import serve, serve_command

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "real_openrlhf.actors.engine.vllm_worker.SyncWorkerExtension"


def serve_model(args: argparse.Namespace) -> None:
    serve(*_serve_command(args, args.host, args.port), api_key=read_key(args.api_key_env))


def reward_model(args: argparse.Namespace) -> None:
    from real_openrlhf.judge.rewards.server import serve_rewards

    # The worker ends vLLM's processes with this one, also if it is killed.
    args.extra = ["--worker-extension-cls", WORKER_EXTENSION, *args.extra]
    serve_rewards(args, lambda host, port: _serve_command(args, host, port))


def _serve_command(args: argparse.Namespace, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    warn_of_versions(*ENGINE)
    tokenizer = load_tokenizer(args.model, name="--model")
    settings = find_settings(args.model, tokenizer, chosen_settings(args))
    room = (args.max_new_tokens or settings.max_new_tokens) + room_for_forcing(make_reader(settings, tokenizer))
    return serve_command(
        args.model,
        device=Device.resolve(args.device),
        host=host,
        port=port,
        max_model_len=engine_length(args.model, room, args.max_model_len),
        logprobs_mode=logprobs_mode_for(settings.temperature, 1.0),
        tensor_parallel_size=args.tensor_parallel_size,
        extra=args.extra,
    )


def fit(args: argparse.Namespace) -> None:
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
