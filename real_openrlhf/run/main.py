"""A run from its configuration to its exit code."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

from real_openrlhf.checkpoint.errors import CheckpointError
from real_openrlhf.common.device import DeviceError
from real_openrlhf.common.errors import FolderError, RunError
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.common.versions import warn_of_versions
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.controller.output_folder import LIBRARIES_FILE, RunLogError, check_output_dir
from real_openrlhf.run.ending import ending
from real_openrlhf.run.feedback import rows_without_feedback, with_feedback
from real_openrlhf.run.inputs import load_inputs
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.library_log import last_lines, written_at
from real_openrlhf.run.plan import make_plan
from real_openrlhf.run.plan_text import render
from real_openrlhf.run.restarts import launch_until_done
from real_openrlhf.run.resume import check_folders, checkpoint_to_load
from real_openrlhf.run.signals import EXIT_RESUME
from real_openrlhf.run.start import launch

logger = logging.getLogger(__name__)


def run(config: Config, *, feedback_model: str | None = None, kept: KeptEngines | None = None) -> int:
    """Exit codes: 0 done, 2 the input is wrong, 1 the run failed, 85 stopped by a signal: --ckpt.load latest resumes.

    feedback_model: the model that writes missing feedback for a warm-up; None: the one that the warm-up begins with.
    kept: rollout engines of this process's runs, inside a Ray session of the caller; None: engines of the run's own.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with ExitStack() as held:
        try:
            # Locked first: if another run writes there, the user learns it before data are loaded.
            if config.ckpt.output_dir and not config.dry_run:
                held.enter_context(FolderLock(config.ckpt.output_dir, "--ckpt.output_dir"))
        except FolderError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        return _run(config, held, feedback_model, kept)


def _run(config: Config, held: ExitStack, feedback_model: str | None, kept: KeptEngines | None) -> int:
    """held: the locks of this run; that of the checkpoint folder is added here."""
    libraries = Path(config.ckpt.output_dir) / LIBRARIES_FILE
    before = written_at(libraries)
    try:
        return _plan_and_launch(config, held, feedback_model, kept)
    except RunError as error:
        sys.stderr.write(f"{last_lines(libraries, before)}error: {error}\n")
        return 1
    except Exception:
        # What an engine or a rank died of is often said there alone.
        sys.stderr.write(last_lines(libraries, before))
        raise


def _plan_and_launch(config: Config, held: ExitStack, feedback_model: str | None, kept: KeptEngines | None) -> int:
    warn_of_versions()
    try:
        plan = make_plan(load_inputs(config))
        if config.dry_run:
            sys.stdout.write(render(plan) + "\n")
            return 0
        for warning in plan.warnings:
            logger.warning("%s", warning)
        if rows_without_feedback(plan):
            if config.ckpt.load == "none":
                # Again later, with the records; here, so that hours of sampling do not come first.
                check_output_dir(config.ckpt.output_dir)
            plan = with_feedback(plan, feedback_model)
        checkpoint = checkpoint_to_load(plan)
        check_folders(plan, checkpoint)
        # Not earlier: the lock makes the folder, and inside the output folder that would look like an earlier run.
        ckpt = plan.config.ckpt
        if Path(ckpt.folder).resolve() != Path(ckpt.output_dir).resolve():
            held.enter_context(FolderLock(ckpt.folder, "--ckpt.path"))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        launch_until_done(plan, checkpoint, launch, kept)
    except Stopped as stopped:
        if not stopped.saved:
            sys.stderr.write(f"error: {stopped}, but its state could not be saved\n")
            return 1
        logger.info("%s; the same command with --ckpt.load latest resumes it", stopped)
        return EXIT_RESUME
    except (ConfigError, DeviceError, RunLogError, CheckpointError) as error:
        # Wrong input that only shows once the cluster or the log is there; nothing has been trained.
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        sys.stdout.write(f"done: {ending(plan)}\n")
    except OSError as error:
        # The judge was exported; the run has not failed because a plot cannot be written.
        logger.warning("done, but its summary could not be written: %s", error)
    return 0
