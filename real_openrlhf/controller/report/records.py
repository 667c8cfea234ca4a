"""Reads what a run has written, for its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScaleError, ScoreScale
from real_openrlhf.common.jsonl import read_lines
from real_openrlhf.controller.output_folder import CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, WARNINGS_FILE

Line = Mapping[str, Any]
# Of a file's end, which holds the last step's judgements: such files grow to gigabytes.
_TAIL = 2**20
_EVALUATION = re.compile(r"step_(\d+)\.jsonl")


class ReportError(ValueError):
    """There is no run whose page could be made; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    train, evals     lines of metrics.jsonl by phase, ascending by step, one a step
    warnings         lines of warnings.jsonl
    first, last      judgements of the first and of the last step of samples.jsonl
    judged           (step, predictions) of the first and the last evaluation; one if there is one
    scale            None where the configuration names none
    """

    folder: Path
    config: Mapping[str, Any]
    train: Sequence[Line]
    evals: Sequence[Line]
    warnings: Sequence[Line]
    first: Sequence[Line]
    last: Sequence[Line]
    judged: Sequence[tuple[int, Sequence[Line]]]
    scale: ScoreScale | None

    def flag(self, name: str) -> Any:
        """The value of a flag in the configuration; None where it is not there."""
        node: Any = self.config
        for part in name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def read_run(folder: str | Path) -> Run:
    """ReportError where the folder is not that of a run. JsonLinesError, OSError: its records cannot be read."""
    folder = Path(folder)
    metrics = folder / METRICS_FILE
    if not metrics.is_file():
        raise ReportError(f"{folder} holds no {METRICS_FILE}; give the --ckpt.output_dir of a run")
    lines = [line for _, line in read_lines(metrics) if isinstance(line, dict) and isinstance(line.get("step"), int)]
    config = _config(folder / CONFIG_FILE)
    run_scale = config.get("real")
    return Run(
        folder=folder,
        config=config,
        train=_by_step(lines, "train"),
        evals=_by_step(lines, "eval"),
        warnings=_objects(folder / WARNINGS_FILE),
        first=_first(folder / SAMPLES_FILE),
        last=_last(folder / SAMPLES_FILE),
        judged=_judged(folder / "eval"),
        scale=_scale(run_scale.get("scale") if isinstance(run_scale, Mapping) else None),
    )


def _by_step(lines: Sequence[Line], phase: str) -> list[Line]:
    found = {line["step"]: line for line in lines if line.get("phase") == phase}
    return [found[step] for step in sorted(found)]


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _scale(text: Any) -> ScoreScale | None:
    try:
        return ScoreScale.parse(text) if isinstance(text, str) else None
    except ScaleError:
        return None


def _objects(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    return [line for _, line in read_lines(path) if isinstance(line, dict)]


def _first(path: Path) -> list[Line]:
    """The judgements of the file's first step."""
    return _of_one_step(line for _, line in read_lines(path)) if path.is_file() else []


def _last(path: Path) -> list[Line]:
    """Those of its last step; of a very long one the end."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        raw = file.read().split(b"\n")
    # The first piece may be the end of a line, the last one a line that is not written out.
    whole = raw[(size > _TAIL) : -1]
    newest = _of_one_step(json.loads(line) for line in reversed(whole))
    return newest[::-1]


def _of_one_step(lines: Iterator[Any]) -> list[Line]:
    found: list[Line] = []
    for line in lines:
        if not isinstance(line, dict) or (found and line.get("step") != found[0].get("step")):
            break
        found.append(line)
    return found


def _judged(folder: Path) -> list[tuple[int, list[Line]]]:
    names = [_EVALUATION.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())]
    steps = sorted(int(name[1]) for name in names if name)
    return [(step, _objects(folder / f"step_{step}.jsonl")) for step in sorted({*steps[:1], *steps[-1:]})]
