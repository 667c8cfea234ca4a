"""The flags of `python -m real_openrlhf.judge`; it imports nothing heavy, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR
from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.paths import text_argument
from real_openrlhf.export.settings import SETTINGS_FILE
from real_openrlhf.judge.backends import AUTO, BACKENDS
from real_openrlhf.judge.output import STANDARD
from real_openrlhf.judge.rubrics import read_rubric
from real_openrlhf.judge.types import CALIBRATION_METHODS, LABELS, MAX_PROMPT_TOKENS, RESULT, JudgeError

SCORE, SERVE, REWARDS, FIT = "score", "serve", "serve --rewards", "calibration fit"
# Flags of vLLM whose values are secrets, and what to do instead.
_SECRET_FLAGS = {
    "--api-key": "put the key into an environment variable, and name it by --api_key_env",
    "--hf-token": "set HF_TOKEN, or run `hf auth login`",
}
_AT_LEAST_ONE = (
    "n",
    "batch_size",
    "concurrency",
    "max_new_tokens",
    "max_model_len",
    "tensor_parallel_size",
    "max_items",
    "max_queue",
)
# What people call a subcommand that there is not.
_MEANT = {
    "compare": "two responses are compared by Judge.compare in Python, a file of pairs by python -m "
    "real_openrlhf.evaluate --pairs NAME=FILE, two evaluations by python -m real_openrlhf.evaluate --compare RUN RUN",
    "calibrate": "it is called calibration fit",
    "calibration": "it is called calibration fit",
    "evaluate": "it is a command of its own: python -m real_openrlhf.evaluate",
    "score": "leave the word out: the command scores --input by itself",
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """args.command is SCORE, SERVE, REWARDS or FIT. Raises JudgeError for a subcommand that there is not."""
    words = list(argv)
    if words[:1] == ["serve"]:
        ours = words[1:] if "--" not in words else words[1 : words.index("--")]
        return rewards_args(words[1:]) if "--rewards" in ours else serve_args(words[1:])
    if words[:2] == ["calibration", "fit"]:
        return fit_args(words[2:])
    if words and not words[0].startswith("-"):
        known = "without a subcommand it scores --input; subcommands are serve and calibration fit"
        raise JudgeError(f"there is no subcommand {words[0]!r}: {_MEANT.get(words[0], known)}")
    return score_args(words)


def check(args: argparse.Namespace) -> None:
    """JudgeError for values that cannot be. args.rubric and args.weights become what these flags hold."""
    for name in _AT_LEAST_ONE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise JudgeError(f"--{name} must be at least 1, got {value}")
    if args.command == FIT and not Path(args.model).is_dir():
        raise JudgeError(f"--model {args.model} is not a folder that a calibration can be stored in")
    if args.command in (SERVE, REWARDS):
        _check_no_key(args.extra)
    if args.command == SERVE:
        read_key(args.api_key_env)
    if args.command == REWARDS:
        _check_rewards(args)
    if args.command == SCORE and args.server is not None and args.backend != AUTO:
        raise JudgeError(f"--backend {args.backend} runs the model in this process, --server elsewhere; give one")
    if args.command in (SCORE, REWARDS):
        args.rubric = None if args.rubric is None else read_rubric(args.rubric, "--rubric")
        args.weights = read_weights(args.weights)
        read_key(args.api_key_env)


def _check_no_key(extra: Sequence[str]) -> None:
    """JudgeError for a secret among vLLM's flags: others see the command lines of running programs."""
    for word in extra:
        name = word.partition("=")[0].replace("_", "-")
        if name in _SECRET_FLAGS:
            raise JudgeError(f"{name}: others see what a command line holds; {_SECRET_FLAGS[name]}")


def _check_rewards(args: argparse.Namespace) -> None:
    read_key(args.token_env, "--token_env")
    if not 0 < args.max_request_mb < math.inf:
        raise JudgeError(f"--max_request_mb must be a positive number, got {args.max_request_mb}")
    if args.unscored_reward is not None and not math.isfinite(args.unscored_reward):
        raise JudgeError(f"--unscored_reward must be a finite number, got {args.unscored_reward}")
    if not 0 <= args.port < 65536:
        raise JudgeError(f"--port must be a port, or 0 for a free one, got {args.port}")
    if args.server is not None and (args.extra or args.tensor_parallel_size != 1):
        given = "flags behind --" if args.extra else "--tensor_parallel_size"
        raise JudgeError(f"{given} are for a vLLM server that is started here; leave them out with --server")
    if args.server is None and (args.api_key_env or args.server_model):
        given = "--api_key_env" if args.api_key_env else "--server_model"
        raise JudgeError(f"{given} is of the server that --server names; requests to this one bring --token_env")


def score_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("", "Scores responses: a row of the input comes out with a 'judgement' beside its columns.")
    add_model(parser)
    add_backend(parser, AUTO)
    add = parser.add_argument
    add(
        "--input",
        required=True,
        help="jsonl, json, csv or parquet file, folder, hub id, or - for JSONL on standard input",
    )
    add("--output", default=STANDARD, help="JSONL file, or - for standard output")
    add(
        "--overwrite",
        action="store_true",
        help="replace an output file that exists, or what a job left that ended early",
    )
    add("--resume", action="store_true", help="go on with a job that ended early, from OUTPUT.partial")
    add("--skip_bad_rows", action="store_true", help="leave out, count and list rows that cannot be used")
    add("--prompt_key", help="column with whole prompts in the form of the training data's, instead of the parts")
    for part in ("instruction", "response", "rubric", "reference", "context"):
        add(f"--{part}_key", default=part, help=f"column of the {part}")
    add_judging(parser)
    add("--top_p", type=float, default=1.0)
    add("--batch_size", type=int, default=256, help="rows that are judged at a time")
    parser.set_defaults(command=SCORE)
    return parser.parse_args(words)


def serve_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(" serve", "Becomes `vllm serve` with what a judge needs here. Flags behind -- go to vLLM.")
    add_model(parser)
    parser.add_argument("--rewards", action="store_true", help="serve rewards; see serve --rewards --help")
    _add_server(parser, 8000)
    parser.add_argument("--api_key_env", help="environment variable with the key that requests must bring")
    parser.set_defaults(command=SERVE)
    return parser.parse_args(words)


def rewards_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        " serve",
        "Scores responses over HTTP as rewards: POST /get_reward in OpenRLHF's form (--reward.remote_url), POST /score "
        "in a plain one; GET /health, GET /metrics. It starts a vLLM server of its own (flags behind -- go to it), "
        "unless --server names one.",
    )
    add_model(parser)
    add = parser.add_argument
    add("--rewards", action="store_true", required=True, help="what this page is about")
    _add_server(parser, 8001)
    add_judging(parser)
    add(
        "--labels",
        choices=LABELS,
        default=LABELS[0],
        help="what OpenRLHF's labels are: a reference answer, a JSON object "
        "with instruction, rubric, reference or context, or nothing to the judge",
    )
    add(
        "--end_text",
        action="append",
        help="text that ends the policy's responses and is no part of them; the judge's "
        "own special tokens when not given",
    )
    add(
        "--unscored_reward",
        type=float,
        help="reward of a response without a readable score, or too long for the "
        "judge; such a request fails when not given",
    )
    add("--token_env", help="environment variable with the token that requests must bring")
    add("--max_request_mb", type=float, default=4.0, help="longest request")
    add("--max_items", type=int, default=256, help="most responses in one request")
    add(
        "--max_queue",
        type=int,
        default=16384,
        help="most responses that wait, over all requests; OpenRLHF sends a whole rollout batch at once",
    )
    parser.set_defaults(command=REWARDS)
    return parser.parse_args(words)


def _add_server(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("extra", nargs="*", metavar="-- VLLM_FLAGS")


def add_judging(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that judges responses: prompt, sampling, and the server to ask."""
    add = parser.add_argument
    add("--rubric", help="for those without one: text, or a .json or .txt file; JSON may hold several dimensions")
    add("--weights", help='JSON of dimension to weight, such as {"tone": 1, "facts": 2}; the plain mean when not given')
    add("--template", help="how the parts become a prompt: a template's name or a file; the export's, else paper")
    add("--other_template", action="store_true", help="take a template that the judge was not trained on")
    add("--template_suffix", help="a second template behind it, such as base_suffix")
    add("--n", type=int, default=1, help="the judge's responses per row, averaged")
    add("--temperature", type=float, help="0 is greedy, which it is for --n 1 when not given")
    add("--seed", type=int, default=0)
    add("--no_force", action="store_true", help="do not continue a response without a score behind a forced anchor")
    add("--calibrated", action="store_true", help="add the score as the stored calibration maps it")
    add("--server", help="address of an OpenAI-compatible server of this model, such as http://127.0.0.1:8000")
    add("--server_model", help="the model's name there, if it serves several")
    add("--api_key_env", help="environment variable with the server's key")
    add("--concurrency", type=int, default=64, help="requests in flight")


def fit_args(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        " calibration fit", "Fits a monotone map from scores to held-out labels, stored beside the model."
    )
    add_model(parser, engine=False)
    add = parser.add_argument
    add("--data", required=True, help="rows with a score and a human label, such as this program's output")
    add("--score_key", default=f"{RESULT}.score", help="column of E[score]")
    add("--label_key", default="label", help="column of the label")
    add("--method", default=CALIBRATION_METHODS[0], choices=CALIBRATION_METHODS)
    parser.set_defaults(command=FIT)
    return parser.parse_args(words)


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m real_openrlhf.judge{prog}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    return take_negative_values(parser)


def add_backend(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=default,
        help="what runs the model in this process: transformers starts at once, vllm is faster on many rows and large "
        "models; auto: transformers for small models on a CPU",
    )


def add_model(parser: argparse.ArgumentParser, *, engine: bool = True, required: bool = True) -> None:
    """The flags that every command has which scores: which model, and how it is used."""
    add = parser.add_argument
    about = "exported judge, or another Hugging Face folder or hub id"
    add("--model", type=text_argument, required=required, help=about)
    if engine:
        add("--device", default="auto", help="auto, cpu or cuda")
        add("--max_new_tokens", type=int, help="longest response; the export's when not given")
        add("--max_model_len", type=int, help=f"prompt and response; {MAX_PROMPT_TOKENS} for the prompt when not given")
    plain = parser.add_argument_group(f"for a model without {SETTINGS_FILE}")
    plain.add_argument("--scale", help="the score scale, such as 1-5; required for such a model")
    plain.add_argument("--anchor", action="append", help=f"text before the score, {DEFAULT_ANCHOR!r} when not given")
    plain.add_argument("--apply_chat_template", choices=("true", "false"), help="if there is one, when not given")
    plain.add_argument("--enable_thinking", choices=("true", "false"), help="handed to the chat template when given")
    plain.add_argument("--input_template", help="text with one {} for the prompt")


def read_key(variable: str | None, flag: str = "--api_key_env") -> str | None:
    """A secret, from the environment variable that the flag names."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise JudgeError(f"{flag} names {variable}, which is not set")
    return key


def read_weights(text: str | None) -> dict[str, float] | None:
    """--weights: a JSON object."""
    if text is None:
        return None
    try:
        weights = json.loads(text)
    except ValueError as error:
        raise JudgeError(f"--weights is not JSON: {error}") from error
    if not isinstance(weights, dict):
        raise JudgeError(f"--weights must be a JSON object of dimension to number, got {text}")
    return weights
