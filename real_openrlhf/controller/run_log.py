"""The records of a run: JSONL always, TensorBoard and Weights & Biases on request.

    metrics.jsonl   one flat object per line: step, phase, time (unix seconds), then the metrics
    samples.jsonl   one judgement per line: step, then what `rollout_stats.judgement_samples` gives
    warnings.jsonl  what `controller.guards` saw go wrong: step, watch, message; empty when nothing did
    not_finite/     batches that were not trained on, since a number was NaN or infinite
    run_config.json the resolved configuration, secrets taken out

A number that is NaN or infinite is written as null and its name listed under "not_finite"; a null
without that is a metric that is undefined (the correlation of constant labels).
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.common.errors import FolderError
from real_openrlhf.common.folder_lock import LOCK_FILE, FolderLock
from real_openrlhf.common.jsonl import JsonLines, JsonLinesError, keep_lines
from real_openrlhf.config.schema import WandbConfig
from real_openrlhf.controller.kept_batch import keep_batch

logger = logging.getLogger(__name__)

Phase = Literal["train", "eval", "sync"]

METRICS_FILE = "metrics.jsonl"
# Of a warm-up: feedback that a model wrote, and TRACT's first stage.
FEEDBACK_FILE = "feedback.jsonl"
STAGE_1 = "stage_1"
# What libraries said (run.library_log).
LIBRARIES_FILE = "libraries.log"
# What may lie in an output folder before its records begin.
BEFORE_RECORDS = frozenset({LOCK_FILE, FEEDBACK_FILE, STAGE_1, LIBRARIES_FILE})
SAMPLES_FILE = "samples.jsonl"
WARNINGS_FILE = "warnings.jsonl"
# Not config.json: the trained model may be saved into the same folder.
CONFIG_FILE = "run_config.json"
WANDB_ID_FILE = "wandb_id"
REDACTED = "<redacted>"

# Seconds that W&B may take to answer at the start, and to take what is left at the end.
_WANDB_START_S = 60.0
_WANDB_END_S = 120.0

_RESERVED = ("step", "phase", "time", "not_finite")
_SECRET_NAMES = {"key", "apikey", "api_key", "password", "secret", "token", "hf_token", "access_token", "auth_token"}
# Environment variables whose values are never recorded, such as WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY.
_SECRET_VARIABLE = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD|PASSWD)(_|$)", re.IGNORECASE)
# A shorter value is no key, and would be found in any text.
_SHORTEST_SECRET = 8


class RunLogError(ValueError):
    """The run cannot be recorded as asked; raised before training starts."""


def redact(config: Any, secrets: Iterable[str] = ()) -> Any:
    """A copy without secrets: values under names such as "key" or "hf_token", and the given strings anywhere.

    Of dotted names, the last part counts ("logger.wandb.key"). Empty values stay, so that a reader
    sees that none was given. Names such as "label_key" or "max_new_tokens" are not secret.
    """
    secrets = [s for s in secrets if s]

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): clean(str(k), v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            return [clean("", v) for v in items]
        if value and isinstance(value, str):
            if name.rsplit(".", 1)[-1].lower() in _SECRET_NAMES:
                return REDACTED
            for secret in secrets:
                value = value.replace(secret, REDACTED)
        return value

    return clean("", config)


def secrets_of_environment() -> list[str]:
    return [
        value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET
    ]


def check_output_dir(output_dir: str | Path, *, append: bool = False, overwrite: bool = False) -> Path:
    """Make the directory and check that it can be written. One with files in it is refused, except:

    append     it holds the records of this run, which are continued
    overwrite  its records are started anew
    """
    path = Path(output_dir)
    if append and overwrite:
        raise RunLogError("a run either continues an output directory or overwrites it, not both")
    _make_writable(path, "--ckpt.output_dir")
    if append and not (path / METRICS_FILE).is_file():
        logger.warning("%s holds no %s: the records start here", path, METRICS_FILE)
    names = sorted(p.name for p in path.iterdir() if p.name not in BEFORE_RECORDS)
    if not append and not overwrite and names:
        found = ", ".join(names[:5])
        raise RunLogError(
            f"--ckpt.output_dir {str(path)!r} is not empty ({found}); choose a new directory, "
            "continue that run, or ask for it to be overwritten"
        )
    return path


def _lock(output_dir: str | Path) -> FolderLock:
    try:
        return FolderLock(output_dir, "--ckpt.output_dir")
    except FolderError as error:
        raise RunLogError(str(error)) from error


def _make_writable(path: Path, flag: str) -> None:
    if path.exists() and not path.is_dir():
        raise RunLogError(f"{flag} {str(path)!r} is a file; give a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise RunLogError(f"{flag} {str(path)!r} cannot be written: {error.strerror or error}") from error


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
        self._held = ExitStack()
        with ExitStack() as held:
            if not locked:
                held.enter_context(_lock(output_dir))
            self.output_dir = check_output_dir(output_dir, append=append, overwrite=overwrite)
            secrets = secrets_of_environment()
            config = redact(config, secrets)
            _write_config(self.output_dir / CONFIG_FILE, config, keep_old=append)
            self._metrics = _records(self.output_dir / METRICS_FILE, append=append, last_step=resume_step)
            self._samples = _records(self.output_dir / SAMPLES_FILE, append=append, last_step=resume_step)
            self._warnings = _records(self.output_dir / WARNINGS_FILE, append=append, last_step=resume_step)
            self._sinks: list[_TensorBoard | _Wandb] = []
            try:
                if tensorboard_dir:
                    self._sinks.append(_TensorBoard(tensorboard_dir, purge_after=resume_step))
                if wandb.mode != "disabled":
                    self._sinks += _wandb(wandb, self.output_dir, config, append, secrets, goes_on=goes_on)
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
        shown = {_tag(phase, name): line[name] for name in metrics if line[name] is not None}
        for sink in list(self._sinks):
            self._to(sink, step, partial(sink.log, step, shown))

    def _to(self, sink: _TensorBoard | _Wandb, step: int, record: Callable[[], None]) -> None:
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
            if isinstance(sink, _Wandb):
                self._to(sink, step, partial(sink.log_evaluation, step, samples, plots))

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


def _cell(value: Any) -> Any:
    """A value of a table: lists as text, since W&B wants one type per column."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: str, *, purge_after: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunLogError("--logger.tensorboard_dir needs the package tensorboard (pip install it)") from error
        if "://" not in folder:
            _make_writable(Path(folder), "--logger.tensorboard_dir")
        purge_step = None if purge_after is None else purge_after + 1
        self._writer = SummaryWriter(folder, purge_step=purge_step)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def _wandb(
    settings: WandbConfig, output_dir: Path, config: Any, append: bool, secrets: Sequence[str], *, goes_on: bool
) -> list[_Wandb]:
    """The sink, or one that records offline, or none. RunLogError only for a run that has not begun."""
    try:
        return [_Wandb(settings, output_dir, config, append=append, secrets=secrets)]
    except RunLogError as error:
        if not goes_on:
            raise
        if settings.mode == "offline":
            logger.warning("the run goes on without W&B: %s", error)
            return []
        logger.warning("the run goes on, and records for W&B offline: %s", error)
    import wandb

    wandb.teardown()  # its process still holds the run's id
    found = _wandb(replace(settings, mode="offline"), output_dir, config, append, secrets, goes_on=True)
    if found:
        logger.warning("later: wandb sync --append %s/wandb/offline-run-*", output_dir)
    return found


class _Wandb:
    name = "W&B"

    def __init__(
        self, settings: WandbConfig, output_dir: Path, config: Any, *, append: bool, secrets: Sequence[str]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RunLogError(
                f"--logger.wandb.mode {settings.mode} needs the package wandb (pip install it, or use disabled)"
            ) from error
        id_file = output_dir / WANDB_ID_FILE
        run_id = id_file.read_text(encoding="utf-8").strip() if append and id_file.exists() else None
        try:
            if settings.mode == "online" and not wandb.api.api_key:
                raise RunLogError("no key was found; set WANDB_API_KEY, or run `wandb login`")
            # W&B's metadata hold the command line.
            options = wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_WANDB_START_S,
                # Without it, a run that is done would wait for a W&B that does not answer for ever.
                finish_timeout=_WANDB_END_S,
                finish_timeout_raises=True,
                x_disable_meta=any(s and s in word for s in secrets for word in sys.argv),
            )
            self._run = wandb.init(
                mode=settings.mode,
                project=settings.project,
                name=settings.run_name,
                group=settings.group,
                entity=settings.org,
                dir=str(output_dir),
                config=config,
                id=run_id,
                resume="allow" if run_id and settings.mode == "online" else None,
                reinit="create_new",
                settings=options,
            )
            for phase in get_args(Phase):
                self._run.define_metric(f"{phase}/*", step_metric="global_step")
            id_file.write_text(self._run.id, encoding="utf-8")
        except Exception as error:
            # `from None`: what W&B raises may quote the key.
            raise RunLogError(
                f"W&B cannot start with --logger.wandb.mode {settings.mode}: {redact(str(error), secrets)} "
                "(offline records without a connection; disabled records nothing)"
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "global_step": step})

    def log_evaluation(self, step: int, samples: Sequence[Mapping[str, Any]], plots: Mapping[str, str]) -> None:
        """A table of judgements and the plots as images, under eval/."""
        import wandb

        media: dict[str, Any] = {f"eval/plots/{name}": wandb.Image(path) for name, path in plots.items()}
        if samples:
            columns = list(samples[0])
            rows = [[_cell(sample[name]) for name in columns] for sample in samples]
            media["eval/judgements"] = wandb.Table(columns=columns, data=rows)
        if media:
            self._run.log({**media, "global_step": step})

    def close(self) -> None:
        try:
            self._run.finish()
        except TimeoutError:
            logger.warning(
                "W&B has not taken everything within %g s; the rest is on this disk: wandb sync --append %s",
                _WANDB_END_S,
                Path(self._run.dir).parent,
            )
