"""TensorBoard and Weights & Biases, which a run's records go to on request."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from real_openrlhf.config.logger_flags import WandbConfig
from real_openrlhf.controller.output_folder import RunLogError, make_writable
from real_openrlhf.controller.records import Phase
from real_openrlhf.controller.redaction import redact

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_id"
# Seconds that W&B may take to answer at the start, and to take what is left at the end.
_WANDB_START_S = 60.0
_WANDB_END_S = 120.0


def _cell(value: Any) -> Any:
    """A value of a table: lists as text, since W&B wants one type per column."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


class TensorBoardSink:
    name = "TensorBoard"

    def __init__(self, folder: str, *, purge_after: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunLogError("--logger.tensorboard_dir needs the package tensorboard (pip install it)") from error
        if "://" not in folder:
            make_writable(Path(folder), "--logger.tensorboard_dir")
        purge_step = None if purge_after is None else purge_after + 1
        self._writer = SummaryWriter(folder, purge_step=purge_step)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


def wandb_sinks(
    settings: WandbConfig, output_dir: Path, config: Any, append: bool, secrets: Sequence[str], *, goes_on: bool
) -> list[WandbSink]:
    """The sink, or one that records offline, or none. RunLogError only for a run that has not begun."""
    offline = replace(settings, mode="offline")
    # W&B's own process can hold the run's id for longer than teardown waits (wandb issue 9865).
    for mode, same_run in ((settings, append), (offline, append), (offline, False)):
        try:
            sink = WandbSink(mode, output_dir, config, append=same_run, secrets=secrets)
        except RunLogError as error:
            if not goes_on:
                raise
            logger.warning("W&B is away: %s", error)
            _teardown()
            continue
        if mode is not settings:
            later = f"wandb sync --append {output_dir}/wandb/offline-run-*"
            logger.warning("the run goes on, and records for W&B offline; later: %s", later)
        return [sink]
    logger.warning("the run goes on without W&B")
    return []


def _teardown() -> None:
    with contextlib.suppress(ImportError):
        import wandb

        wandb.teardown()


class WandbSink:
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
