"""TRACT's two stages as one command (Chiang et al., 2025).

<output>/stage_1/        RAFT on the feedback of the data: a whole run of its own
<output>/feedback.jsonl  feedback that stage 1's judge writes, each with the human score
<output>/                RAFT on that, from the model that stage 1 began with
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_openrlhf.config.cli import config_to_dict
from real_openrlhf.config.schema import Config
from real_openrlhf.controller.output_folder import CONFIG_FILE, STAGE_1
from real_openrlhf.run.export import exported_step
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.main import run

logger = logging.getLogger(__name__)

# What may differ between a stage 1 that is there and the one that is asked for.
_ELSEWHERE = ("ckpt", "logger", "ray", "overridden", "dry_run", "warmup")


def run_tract(config: Config, *, kept: KeptEngines | None = None) -> int:
    """Exit codes of `run.main.run`, and its `kept`. An interrupted stage goes on with --ckpt.load auto or latest."""
    first = stage_1(config)
    folder = Path(first.ckpt.output_dir)
    if config.dry_run:
        code = run(first)
        sys.stdout.write("Then stage 1's judge writes feedback for every row, and the start learns that.\n")
        return code
    if exported_step(folder / "model") is not None:
        changed = _changed(folder, first)
        if changed:
            sys.stderr.write(
                f"error: {folder} was trained with other flags ({', '.join(changed)}); remove it, or choose another "
                "--ckpt.output_dir\n"
            )
            return 2
        logger.info("stage 1 is done: %s", folder / "model")
    else:
        code = run(first, kept=kept)
        if code != 0:
            return code
    return run(stage_2(config), feedback_model=str(folder / "model"), kept=kept)


def stage_1(config: Config) -> Config:
    """RAFT on the data's feedback, in a folder below the output's."""
    ckpt = config.ckpt
    output = str(Path(ckpt.output_dir) / STAGE_1) if ckpt.output_dir else ""
    path = str(Path(ckpt.path) / STAGE_1) if ckpt.path else None
    return replace(
        config,
        warmup=replace(config.warmup, method="raft"),
        ckpt=replace(ckpt, output_dir=output, path=path),
    )


def stage_2(config: Config) -> Config:
    """RAFT on feedback that is sampled for every row."""
    return replace(config, warmup=replace(config.warmup, feedback="sampled"))


def _changed(folder: Path, config: Config) -> list[str]:
    """The sections of flags in which a finished stage 1 differs from this configuration."""
    was: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(config_to_dict(config)))
    return sorted(name for name in now if name not in _ELSEWHERE and was.get(name) != now[name])
