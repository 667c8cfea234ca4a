"""The settings of a judge: those of an export, or given by the user for any other model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScoreScale
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.data.tokenizer import end_token_ids
from real_openrlhf.export.settings import SETTINGS_FILE, JudgeSettings
from real_openrlhf.judge.types import JudgeError


def find_settings(model: str | Path, tokenizer: Any, given: JudgeSettings | None) -> JudgeSettings:
    """The given settings, else those of the export. JudgeError for a folder with neither."""
    if given is not None:
        return given
    if not (Path(model) / SETTINGS_FILE).is_file():
        chat = "with" if tokenizer.chat_template else "without"
        raise JudgeError(
            f"{model} has no {SETTINGS_FILE}, so it is not an export of this package; say how it is used: "
            "settings=plain_settings(...), or on the command line --scale and all that differs from the defaults "
            f"(its tokenizer is {chat} a chat template)"
        )
    return JudgeSettings.load(model)


def make_reader(settings: JudgeSettings, tokenizer: Any) -> ScoreReader:
    bound = bind_scale(settings.scale, tokenizer, settings.anchors)
    return ScoreReader.build(bound, tokenizer, settings.end_ids)


def plain_settings(
    model: str | Path,
    tokenizer: Any,
    *,
    scale: str | ScoreScale = "1-5",
    anchors: Sequence[str] = (DEFAULT_ANCHOR,),
    apply_chat_template: bool | None = None,
    enable_thinking: bool | None = None,
    input_template: str | None = None,
    renormalise: bool = False,
    max_new_tokens: int = 1024,
) -> JudgeSettings:
    """Settings for a model that was not exported by this package.

    apply_chat_template: None uses the chat template if the tokenizer has one.
    """
    return JudgeSettings(
        scale=scale if isinstance(scale, ScoreScale) else ScoreScale.parse(scale),
        anchors=tuple(anchors),
        end_ids=tuple(sorted(end_token_ids(str(model), tokenizer))),
        template=PromptTemplate(
            input_template=input_template,
            apply_chat_template=bool(tokenizer.chat_template) if apply_chat_template is None else apply_chat_template,
            enable_thinking=enable_thinking,
        ),
        renormalise=renormalise,
        max_new_tokens=max_new_tokens,
    )
