"""How the model that a command line names is used: by its own settings, or as its flags say."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.export.settings import SETTINGS_FILE, JudgeSettings
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.resolve_settings import plain_settings
from real_openrlhf.judge.types import JudgeError


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


def judge_of(args: argparse.Namespace, **options: Any) -> Judge:
    """The judge that the flags of every command name; options: what one command alone has flags for."""
    return Judge(
        args.model,
        settings=chosen_settings(args),
        template=args.template,
        other_template=args.other_template,
        n=args.n,
        temperature=args.temperature,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        force=not args.no_force,
        **options,
    )


def _truth(text: str | None) -> bool | None:
    return None if text is None else text == "true"
