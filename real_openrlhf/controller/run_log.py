"""The records of a run: JSONL always, TensorBoard and Weights & Biases on request.

    metrics.jsonl   one flat object per line: step, phase, time (unix seconds), then the metrics
    samples.jsonl   one judgement per line: step, then what `rollout_stats.judgement_samples` gives
    warnings.jsonl  what `controller.guards` saw go wrong: step, watch, message; empty when nothing did
    not_finite/     batches that were not trained on, since a number was NaN or infinite
    run_config.json the resolved configuration, secrets taken out
    report.html     a page that shows all of this

A number that is NaN or infinite is written as null and its name listed under "not_finite"; a null
without that is a metric that is undefined (the correlation of constant labels).
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.common.jsonl import JsonLines, JsonLinesError, keep_lines
from real_openrlhf.config.logger_flags import WandbConfig
from real_openrlhf.controller.kept_batch import keep_batch
from real_openrlhf.controller.log_sinks import TensorBoardSink, WandbSink, wandb_sinks
from real_openrlhf.controller.output_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    WARNINGS_FILE,
    RunLogError,
    check_output_dir,
    lock_folder,
)
from real_openrlhf.controller.records import Phase
from real_openrlhf.controller.redaction import redact, secrets_of_environment

logger = logging.getLogger(__name__)

_RESERVED = ("step", "phase", "time", "not_finite")


class RunLog:
    """Writes the records of one run. Use as a context manager, or call `close`.

    output_dir       created if missing; see `check_output_dir`
    tensorboard_dir  None: no TensorBoard
    config           the resolved configuration, any nesting
    append           continue the run that is recorded in output_dir
    resume_step      with append: the last step to keep; later lines are dropped, since the run makes those steps again
    overwrite        start the records in output_dir anew
    locked           the caller holds output_dir's lock; else the log holds it until it is closed
    goes_on          the run began before: if W&B does not answer now, it records offline

    Start-up problems raise RunLogError. Later ones (a full disk, a lost connection) are logged and
    never stop the training.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        tensorboard_dir: str | None,
        wandb: WandbConfig,
        config: Mapping[str, Any],
        append: bool = False,
        resume_step: int | None = None,
        overwrite: bool = False,
        locked: bool = False,
        goes_on: bool = False,
    ) -> None:
        if resume_step is not None and not append:
            raise RunLogError("resume_step needs append: there is nothing to resume")
        # Of this process: something to show, and when the page may be written again.
        self._trained, self._next_page = False, 0.0
        self._held = ExitStack()
        with ExitStack() as held:
            if not locked:
                held.enter_context(lock_folder(output_dir))
            self.output_dir = check_output_dir(output_dir, append=append, overwrite=overwrite)
            secrets = secrets_of_environment()
            config = redact(config, secrets)
            _write_config(self.output_dir / CONFIG_FILE, config, keep_old=append)
            self._metrics = _records(self.output_dir / METRICS_FILE, append=append, last_step=resume_step)
            self._samples = _records(self.output_dir / SAMPLES_FILE, append=append, last_step=resume_step)
            self._warnings = _records(self.output_dir / WARNINGS_FILE, append=append, last_step=resume_step)
            self._sinks: list[TensorBoardSink | WandbSink] = []
            try:
                if tensorboard_dir:
                    self._sinks.append(TensorBoardSink(tensorboard_dir, purge_after=resume_step))
                if wandb.mode != "disabled":
                    self._sinks += wandb_sinks(wandb, self.output_dir, config, append, secrets, goes_on=goes_on)
            except BaseException:
                self.close()
                raise
            self._held = held.pop_all()

    def log(self, step: int, phase: Phase, metrics: Mapping[str, Any]) -> None:
        """One line. Values: numbers (also of torch and numpy) or None for an undefined metric."""
        if phase not in get_args(Phase):
            raise ValueError(f"phase {phase!r} is not one of {list(get_args(Phase))}")
        line: dict[str, Any] = {"step": step, "phase": phase, "time": time.time()}
        bad: list[str] = []
        for name, value in metrics.items():
            if name in _RESERVED:
                raise ValueError(f"a metric cannot be named {name!r}: the line has that field already")
            number = _number(name, value)
            if isinstance(number, float) and not math.isfinite(number):
                bad.append(name)
                number = None
            line[name] = number
        if bad:
            line["not_finite"] = bad
            logger.warning("step %d, %s: not finite, recorded as null: %s", step, phase, ", ".join(bad))
        _write(self._metrics, line)
        self._trained = self._trained or phase == "train"
        shown = {_tag(phase, name): line[name] for name in metrics if line[name] is not None}
        for sink in list(self._sinks):
            self._to(sink, step, partial(sink.log, step, shown))

    def _to(self, sink: TensorBoardSink | WandbSink, step: int, record: Callable[[], None]) -> None:
        try:
            record()
        except Exception as error:
            # Training goes on: metrics.jsonl has everything, and such a fault rarely goes away by itself.
            self._sinks.remove(sink)
            logger.warning("%s stopped recording at step %d: %s", sink.name, step, error)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """One line per judgement."""
        for sample in samples:
            bad: list[str] = []
            line = {"step": step, **_finite(dict(sample), "", bad)}
            if bad:
                line["not_finite"] = bad
            _write(self._samples, line)

    def warn(self, step: int, watch: str, message: str) -> None:
        """What a watch over the run has seen."""
        logger.warning("step %d: %s", step, message)
        _write(self._warnings, {"step": step, "watch": watch, "message": message})

    def keep_batch(self, step: int, groups: Sequence[TrainGroup], metrics: Mapping[str, Any]) -> str:
        """Keep a batch for study (`kept_batch`); returns in words where it is, or why it is not kept."""
        try:
            path = keep_batch(self.output_dir, step, groups, metrics)
        except OSError as error:
            return f"its batch could not be kept: {error}"
        return "earlier batches of that kind are kept already" if path is None else f"its batch is in {path}"

    def log_evaluation(self, step: int, samples: Sequence[Mapping[str, Any]], plots: Mapping[str, str]) -> None:
        """Judgements and plots (name -> path of a PNG) of an evaluation; W&B alone shows them."""
        for sink in list(self._sinks):
            if isinstance(sink, WandbSink):
                self._to(sink, step, partial(sink.log_evaluation, step, samples, plots))

    def page(self, *, last: bool = False) -> None:
        """Write report.html anew. Not before the first step, and not more often than it takes a twentieth of the time,
        unless it is the last one. A page that fails ends nothing."""
        begun = time.monotonic()
        if not last and (not self._trained or begun < self._next_page):
            return
        # Here: matplotlib takes a second to import.
        from real_openrlhf.controller.report.page import write_report

        try:
            write_report(self.output_dir)
        except Exception as error:
            logger.warning("the page of the run could not be written: %s", error)
        taken = time.monotonic() - begun
        self._next_page = begun + 20 * taken

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", sink.name, error)
        self._sinks = []
        self._metrics.close()
        self._samples.close()
        self._warnings.close()
        self._held.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tag(phase: str, name: str) -> str:
    return name if name.startswith(f"{phase}/") else f"{phase}/{name}"


def _number(name: str, value: Any) -> int | float | None:
    if value is None or type(value) in (int, float):
        return value
    if isinstance(value, numbers.Integral):  # bool and numpy integers
        return int(value)
    if isinstance(value, (str, bytes)):
        raise TypeError(f"metric {name!r} is the text {value!r}; metrics are numbers")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, not one number") from error


def _finite(value: Any, path: str, bad: list[str]) -> Any:
    """The value with NaN and infinities as None; their paths are added to `bad`."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v, f"{path}.{k}" if path else str(k), bad) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v, f"{path}[{i}]", bad) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        bad.append(path)
        return None
    return value


def _write_config(path: Path, config: Any, *, keep_old: bool) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str) + "\n"
    if keep_old and path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (kept := path.with_name(f"run_config.{number}.json")).exists():
            number += 1
        os.replace(path, kept)
        logger.warning("the configuration differs from the one this run began with, which is now %s", kept.name)
    path.write_text(text, encoding="utf-8")


def _records(path: Path, *, append: bool, last_step: int | None) -> JsonLines:
    """Open a file of records. Without append it is emptied; with append, lines after last_step are removed."""

    def counts(number: int, line: Any) -> bool:
        try:
            return last_step is None or line["step"] <= last_step
        except (KeyError, TypeError) as error:
            raise JsonLinesError(f"{path}, line {number} is not a record of a run") from error

    try:
        if append and path.exists():
            keep_lines(path, counts)
        return JsonLines(path, append=append)
    except JsonLinesError as error:
        raise RunLogError(f"{error}; it cannot be continued") from error
    except OSError as error:
        raise RunLogError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def _write(file: JsonLines, line: Mapping[str, Any]) -> None:
    try:
        file.write(line)
    except OSError as error:
        logger.error("a line of %s is lost: %s", file.path, error)
