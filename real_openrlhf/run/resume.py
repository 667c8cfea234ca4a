"""The checkpoint that a run resumes from, and checks of the folders that it writes."""

from __future__ import annotations

from pathlib import Path

from real_openrlhf.checkpoint.manifest import Checkpoint
from real_openrlhf.config.schema import CkptConfig
from real_openrlhf.controller.checkpointing import find_checkpoint, make_store
from real_openrlhf.controller.output_folder import BEFORE_RECORDS, CONFIG_FILE, check_output_dir
from real_openrlhf.run.plan import RunPlan


def checkpoint_to_load(plan: RunPlan) -> Checkpoint | None:
    """The complete checkpoint that --ckpt.load names, if any. CheckpointError for one that cannot be resumed from."""
    ckpt = plan.config.ckpt
    if ckpt.load == "none":
        return None
    return find_checkpoint(ckpt.folder, ckpt.load, plan.identity, metric=ckpt.best_metric, force=ckpt.force)


def check_folders(plan: RunPlan, checkpoint: Checkpoint | None) -> None:
    """Check that records and checkpoints can be written. CheckpointError or RunLogError, before anything starts."""
    ckpt = plan.config.ckpt
    check_output_dir(ckpt.output_dir, append=checkpoint is not None, overwrite=starts_anew(ckpt, checkpoint))
    make_store(ckpt.folder, keep=ckpt.max_num, metric=ckpt.best_metric).open()


def starts_anew(ckpt: CkptConfig, checkpoint: Checkpoint | None) -> bool:
    """Whether --ckpt.load auto starts the records anew: an earlier run ended here before its first checkpoint.

    Never for a folder with a judge, or with anything like a checkpoint, complete or broken.
    """
    output = Path(ckpt.output_dir)
    if ckpt.load != "auto" or checkpoint is not None or not output.is_dir():
        return False
    names = {path.name for path in output.iterdir()}
    ours = CONFIG_FILE in names or names <= {"checkpoints", *BEFORE_RECORDS}
    return ours and not any(Path(ckpt.folder).glob("step_*")) and not (output / "model").exists()
