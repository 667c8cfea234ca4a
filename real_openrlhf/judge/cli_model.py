"""The flags that every subcommand of `python -m real_openrlhf.judge` has: which model, and how it scores."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR
from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.paths import text_argument
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.export.settings import SETTINGS_FILE, JudgeSettings
from real_openrlhf.judge.judge import MAX_PROMPT_TOKENS
from real_openrlhf.judge.resolve_settings import plain_settings
from real_openrlhf.judge.types import JudgeError


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m real_openrlhf.judge{prog}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    return take_negative_values(parser)


def add_model(parser: argparse.ArgumentParser, *, engine: bool = True, required: bool = True) -> None:
    add = parser.add_argument
    about = "exported judge, or another Hugging Face folder or hub id"
    add("--model", type=text_argument, required=required, help=about)
    if engine:
        add("--device", default="auto", help="auto, cpu or cuda")
        add("--max_new_tokens", type=int, help="longest response, in tokens; default: the export's")
        add("--max_model_len", type=int, help=f"prompt and response; {MAX_PROMPT_TOKENS} for the prompt when not given")
    plain = parser.add_argument_group(f"for a model without {SETTINGS_FILE}")
    plain.add_argument("--scale", help="the score scale, such as 1-5; required for such a model")
    plain.add_argument("--anchor", action="append", help=f"text before the score, {DEFAULT_ANCHOR!r} when not given")
    plain.add_argument("--apply_chat_template", choices=("true", "false"), help="if there is one, when not given")
    plain.add_argument("--enable_thinking", choices=("true", "false"), help="handed to the chat template when given")
    plain.add_argument("--input_template", help="text with one {} for the prompt")


def chosen_settings(args: argparse.Namespace) -> JudgeSettings | None:
    """None: the export's own."""
    names = ("scale", "anchor", "apply_chat_template", "enable_thinking", "input_template")
    chosen = [f"--{name}" for name in names if getattr(args, name) is not None]
    if (Path(args.model) / SETTINGS_FILE).is_file():
        if chosen:
            raise JudgeError(f"{args.model} has its own settings in {SETTINGS_FILE}; drop {', '.join(chosen)}")
        return None
    if args.scale is None:
        raise JudgeError(f"{args.model} has no {SETTINGS_FILE}: say how it scores, at least --scale 1-5")
    return plain_settings(
        args.model,
        load_tokenizer(args.model, name="--model"),
        scale=args.scale,
        anchors=args.anchor or (DEFAULT_ANCHOR,),
        apply_chat_template=_truth(args.apply_chat_template),
        enable_thinking=_truth(args.enable_thinking),
        input_template=args.input_template,
    )


def read_key(variable: str | None) -> str | None:
    """The server's key, from the environment variable that --api_key_env names."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise JudgeError(f"--api_key_env names {variable}, which is not set")
    return key


def _truth(text: str | None) -> bool | None:
    return None if text is None else text == "true"
