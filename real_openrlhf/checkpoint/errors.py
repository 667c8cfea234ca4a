"""Errors of checkpoints."""

from __future__ import annotations

from real_openrlhf.common.errors import FolderError


class CheckpointError(FolderError):
    """No checkpoint can be used as asked; the message names the path and what would work."""


class NoCheckpointError(CheckpointError):
    """The folder has no checkpoint at all, not even a broken one: a first start."""


class IncompatibleCheckpointError(CheckpointError):
    """The checkpoint was made with another model, tokenizer, data set, template or scale."""


class LayoutError(CheckpointError):
    """The checkpoint's shards are for another number of ranks or another ZeRO stage."""


class CheckpointWriteError(RuntimeError):
    """A save failed and left no files; earlier checkpoints are untouched and the run can go on."""
