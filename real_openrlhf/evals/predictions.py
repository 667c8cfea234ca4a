"""Predictions of a judge, one line each, in a file that grows while they are made.

    {"format": "real_openrlhf.predictions", "version": 1, "identity": {...}}    line 1: model, data and settings
    {"benchmark": "flask", "row": 0, "label": 4.0, "expected": 3.71, ...}       one `Prediction` per line

An interrupted run continues after the last complete line; a file of another model, data or setting is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from real_openrlhf.common.errors import FolderError
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.common.jsonl import JsonLines, JsonLinesError, keep_lines, read_lines
from real_openrlhf.data.row import shorten

FORMAT = "real_openrlhf.predictions"
FORMAT_VERSION = 1


class EvaluationError(ValueError):
    """The evaluation cannot be run, continued or compared; the message says why and what would work."""


@dataclass(frozen=True, kw_only=True)
class SampledFeedback:
    """One generation of the judge.

    feedback      the text before the answer anchor
    token_ids     the whole response, a forced anchor included
    position      index of the score token; None without one
    distribution  [S] probabilities of the labels at the score position, over the full vocabulary; an entry is None if
                  the backend did not return it
    expected      E[score]; None if missing
    decoded       value of the written label; None if missing
    reason        why there is no score, or none on the scale
    forced        no score was written, so the anchor was appended to the response
    """

    feedback: str
    token_ids: tuple[int, ...]
    position: int | None
    distribution: tuple[float | None, ...] | None
    expected: float | None
    decoded: float | None
    reason: str | None
    forced: bool
    n_generated: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The judge's scores for one prompt of a benchmark: means over its samples, None where no sample has the value.

    row           index in the benchmark
    group         rows with the same group are not independent (a question, a pair)
    label         the human score
    distribution  [S] probabilities, as in the samples
    mass          their sum
    samples       one, or N with average-of-N
    """

    benchmark: str
    row: int
    group: str
    label: float
    expected: float | None
    decoded: float | None
    distribution: tuple[float | None, ...] | None
    mass: float | None
    entropy: float | None
    reason: str | None
    samples: tuple[SampledFeedback, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.benchmark, self.row

    @property
    def invalid_share(self) -> float:
        """Share of the samples from which no score could be read, not even after a forced anchor."""
        return sum(sample.position is None for sample in self.samples) / len(self.samples)

    @property
    def forced_share(self) -> float:
        """Share of the samples whose score was read after a forced anchor."""
        return sum(sample.forced for sample in self.samples) / len(self.samples)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Prediction:
        """Raises ValueError for anything but the fields of a prediction."""
        values = _fields_of(cls, content)
        samples = [_fields_of(SampledFeedback, sample) for sample in values["samples"]]
        for item in samples:
            item["token_ids"] = tuple(item["token_ids"])
        for item in (values, *samples):
            item["distribution"] = None if item["distribution"] is None else tuple(item["distribution"])
        values["samples"] = tuple(SampledFeedback(**sample) for sample in samples)
        return cls(**values)


def _fields_of(cls: Any, content: Any) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"a {cls.__name__} has the fields {sorted(names)}, got {shorten(content)}")
    return dict(content)


class PredictionStore:
    """The file of a running evaluation. done: the predictions that are already in it, by (benchmark, row)."""

    def __init__(self, path: str | Path, identity: Mapping[str, Any], *, locked: bool = False) -> None:
        """Begin the file, or continue it. Raises EvaluationError when it belongs to another evaluation, and when
        another program writes into its folder.

        locked: the caller holds the folder's lock; else the store holds it until it is closed.
        """
        path = Path(path)
        self._held = ExitStack()
        with ExitStack() as held:
            if not locked:
                held.enter_context(_lock(path.parent))
            self._begin(path, identity)
            self._held = held.pop_all()

    def _begin(self, path: Path, identity: Mapping[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))  # the form in which it is read back: tuples become lists
        self.done: dict[tuple[str, int], Prediction] = {}
        try:
            if path.exists():
                keep_lines(path)
            self._file = JsonLines(path, append=True)
            if path.stat().st_size == 0:
                self._file.write({"format": FORMAT, "version": FORMAT_VERSION, "identity": identity})
        except OSError as error:
            raise EvaluationError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
        except JsonLinesError as error:
            raise EvaluationError(f"{error}; give another --output_dir") from error
        found, predictions = read_predictions(path)
        differing = [name for name in {**identity, **found} if identity.get(name) != found.get(name)]
        if differing:
            self.close()
            shown = "; ".join(
                f"{name}: {shorten(found.get(name), 200)} in the file, {shorten(identity.get(name), 200)} now"
                for name in differing
            )
            raise EvaluationError(
                f"{path} holds another evaluation and cannot be continued: {shown}. Give another --output_dir, or the "
                "same settings."
            )
        self.done = {prediction.key: prediction for prediction in predictions}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Raises OSError when the disk is full; earlier lines stay complete."""
        for prediction in predictions:
            self._file.write(prediction.to_json())
            self.done[prediction.key] = prediction

    def close(self) -> None:
        self._file.close()
        self._held.close()


def _lock(folder: Path) -> FolderLock:
    try:
        return FolderLock(folder, "--output_dir")
    except FolderError as error:
        raise EvaluationError(str(error)) from error


def read_predictions(path: str | Path) -> tuple[dict[str, Any], list[Prediction]]:
    """Identity and predictions, in the file's order. Raises EvaluationError naming the line."""
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"{path}: there is no such file; an evaluation writes it into its --output_dir")
    identity: dict[str, Any] | None = None
    predictions: list[Prediction] = []
    try:
        for number, value in read_lines(path):
            if number == 1:
                identity = _identity(path, value)
                continue
            try:
                predictions.append(Prediction.from_json(value))
            except (ValueError, TypeError) as error:
                raise EvaluationError(f"{path}, line {number} is not a prediction: {error}") from error
    except JsonLinesError as error:
        raise EvaluationError(str(error)) from error
    if identity is None:
        raise EvaluationError(f"{path} is empty")
    (most, count), *_ = Counter(p.key for p in predictions).most_common(1) or [(("", 0), 0)]
    if count > 1:
        raise EvaluationError(f"{path} holds row {most[1]} of {most[0]} {count} times; two programs wrote into it")
    return identity, predictions


def _identity(path: Path, header: Any) -> dict[str, Any]:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise EvaluationError(f"{path} does not hold predictions: its first line is not their header")
    if header.get("version") != FORMAT_VERSION:
        raise EvaluationError(
            f"{path} is of format version {header.get('version')!r}; this program reads version {FORMAT_VERSION}"
        )
    return dict(header["identity"])
