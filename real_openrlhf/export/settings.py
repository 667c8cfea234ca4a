"""The settings that a program needs to use an exported model as the judge it was trained to be."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScaleError, ScoreScale
from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.row import DataError
from real_openrlhf.data.template import PromptTemplate, TemplateError

SETTINGS_FILE = "real_openrlhf.json"
FORMAT = "real_openrlhf.judge"
FORMAT_VERSION = 1


class ExportError(ValueError):
    """The folder is not a complete judge; the message names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """The settings that a program needs to use the model as the judge it was trained to be.

    scale, anchors   see `real_openrlhf.algo.bound_scale`
    end_ids          token ids that end a response
    template         how a prompt becomes token ids: chat template, input template
    temperature      at which score distributions are read
    renormalise      E[score] given that the score is on the scale, instead of over the full vocabulary
    max_new_tokens   room for the feedback and the score
    preset           of the training run, for information only
    step             training step after which the policy had these weights; None: not recorded
    judge_template   how instruction, response and rubric become a prompt, with its system message; None: not recorded,
                     as for training prompts that were given whole
    """

    scale: ScoreScale
    anchors: tuple[str, ...]
    end_ids: tuple[int, ...]
    template: PromptTemplate = field(default_factory=PromptTemplate)
    temperature: float = 1.0
    renormalise: bool = False
    max_new_tokens: int = 1024
    preset: str = "paper"
    step: int | None = None
    judge_template: JudgeTemplate | None = None

    def __post_init__(self) -> None:
        if not self.anchors or not all(isinstance(a, str) and a.strip() for a in self.anchors):
            raise ExportError(f"anchors must be one or more texts, got {list(self.anchors)!r}")
        if not self.end_ids or not all(type(i) is int and i >= 0 for i in self.end_ids):
            raise ExportError(f"end_ids must be one or more token ids, got {list(self.end_ids)!r}")
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < float("inf"):
            raise ExportError(f"temperature must be a positive number, got {self.temperature!r}")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ExportError(f"max_new_tokens must be a positive whole number, got {self.max_new_tokens!r}")
        _expect("renormalise", self.renormalise, bool)
        _expect("preset", self.preset, str)
        if self.step is not None:
            _expect("step", self.step, int)

    def save(self, folder: str | Path) -> Path:
        """Write real_openrlhf.json into the folder."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        path = Path(folder) / SETTINGS_FILE
        try:
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        except TypeError as error:
            raise ExportError(f"the judge settings cannot be written as JSON: {error}") from error
        return path

    @classmethod
    def load(cls, folder: str | Path) -> JudgeSettings:
        """Read them back. Raises ExportError naming the file and the field."""
        path = Path(folder) / SETTINGS_FILE
        content = read_json(path)
        if content.get("format") != FORMAT or content.get("version") != FORMAT_VERSION:
            raise ExportError(
                f"{path}: format {content.get('format')!r} version {content.get('version')!r}; "
                f"this package reads {FORMAT!r} version {FORMAT_VERSION}"
            )
        try:
            values = _fields_of(cls, {k: v for k, v in content.items() if k not in ("format", "version")}, "")
            values["scale"] = _scale(values["scale"])
            if "template" in values:
                values["template"] = _template(values["template"])
            if values.get("judge_template") is not None:
                values["judge_template"] = JudgeTemplate.from_json(values["judge_template"])
            for name in ("anchors", "end_ids"):
                values[name] = tuple(_expect(name, values[name], list))
            return cls(**values)
        except (ExportError, ScaleError, DataError, TemplateError) as error:
            raise ExportError(f"{path}: {error}") from error


def _scale(content: Any) -> ScoreScale:
    parts = _fields_of(ScoreScale, content, "scale.")
    values = [float(_expect("scale.values", v, float)) for v in _expect("scale.values", parts["values"], list)]
    labels = [_expect("scale.labels", v, str) for v in _expect("scale.labels", parts["labels"], list)]
    return ScoreScale(tuple(values), tuple(labels))


def _template(content: Any) -> PromptTemplate:
    values = _fields_of(PromptTemplate, content, "template.")
    for name, kind in (("input_template", str), ("apply_chat_template", bool), ("enable_thinking", bool)):
        if values.get(name) is not None or (name == "apply_chat_template" and name in values):
            _expect(f"template.{name}", values[name], kind)
    return PromptTemplate(**values)


def _expect(name: str, value: Any, kind: Any) -> Any:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ExportError(f"{name} must be a {kind.__name__}, got {value!r}")
    return value


def _fields_of(cls: Any, content: Any, prefix: str) -> dict[str, Any]:
    """The content as keyword arguments for the dataclass. Fields with a default may be missing (earlier exports)."""
    if not isinstance(content, dict):
        raise ExportError(f"{prefix.rstrip('.') or 'the file'} must be an object, got {content!r}")
    names = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = sorted(needed - set(content)), sorted(set(content) - names)
    if missing:
        raise ExportError(f"missing: {', '.join(prefix + name for name in missing)}")
    if unknown:
        raise ExportError(f"unknown: {', '.join(prefix + name for name in unknown)}")
    return dict(content)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} must hold a JSON object")
    return content
