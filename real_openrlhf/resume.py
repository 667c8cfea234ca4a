"""Where a run goes on: what identifies it, and the checkpoint that its flags ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from real_openrlhf.checkpoint.compat import RunIdentity, model_config_sha256, tokenizer_sha256
from real_openrlhf.checkpoint.store import Checkpoint
from real_openrlhf.config.cli import config_to_dict
from real_openrlhf.config.schema import CkptConfig
from real_openrlhf.controller.checkpointing import find_checkpoint, make_store
from real_openrlhf.controller.run_log import CONFIG_FILE, check_output_dir

if TYPE_CHECKING:
    from real_openrlhf.train_real import Inputs


def run_identity(inputs: Inputs) -> RunIdentity:
    """What must be the same to resume, and the settings that may change with a warning."""
    config = inputs.config
    flags = config_to_dict(config)
    scale = config.real.score_scale
    return RunIdentity(
        model_sha256=model_config_sha256(AutoConfig.from_pretrained(config.actor.model_name_or_path).to_dict()),
        tokenizer_sha256=tokenizer_sha256(inputs.tokenizer),
        data_sha256=inputs.train_set.sha256,
        template_sha256=inputs.template.sha256,
        scale=tuple(zip(scale.values, scale.labels)),
        anchors=config.real.anchor,
        preset=config.real.preset,
        seed=config.train.seed,
        ranks=config.ranks,
        zero_stage=config.ds.zero_stage,
        adapters=str(config.ds.lora),
        settings={name: flags[name] for name in ("actor", "algo", "rollout", "real", "vllm")},
    )


def checkpoint_to_load(inputs: Inputs) -> Checkpoint | None:
    """The complete checkpoint that --ckpt.load names, if any. CheckpointError for one that cannot be resumed from."""
    ckpt = inputs.config.ckpt
    if ckpt.load == "none":
        return None
    identity = run_identity(inputs)
    return find_checkpoint(ckpt.folder, ckpt.load, identity, metric=ckpt.best_metric, force=ckpt.force)


def check_folders(inputs: Inputs, checkpoint: Checkpoint | None) -> None:
    """Prove that records and checkpoints can be written; CheckpointError or RunLogError, before anything starts."""
    ckpt = inputs.config.ckpt
    check_output_dir(ckpt.output_dir, append=checkpoint is not None, overwrite=starts_anew(ckpt, checkpoint))
    make_store(ckpt.folder, keep=ckpt.max_num, metric=ckpt.best_metric).open()


def starts_anew(ckpt: CkptConfig, checkpoint: Checkpoint | None) -> bool:
    """--ckpt.load auto on what a run left that ended before its first checkpoint: its records begin again.

    A folder with a judge, or with anything like a checkpoint, whole or broken, is never begun again.
    """
    output = Path(ckpt.output_dir)
    if ckpt.load != "auto" or checkpoint is not None or not output.is_dir():
        return False
    ours = (output / CONFIG_FILE).is_file() or {path.name for path in output.iterdir()} <= {"checkpoints"}
    return ours and not any(Path(ckpt.folder).glob("step_*")) and not (output / "model").exists()
