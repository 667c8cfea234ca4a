"""Saves and loads the policy's part of a checkpoint, which another number of ranks may load too.

    <path>/deepspeed/      DeepSpeed's shards of weights, optimizer and schedule
    <path>/rank_<i>.pt     each rank's own state: counters and random numbers

Everything here is called on all ranks at once.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import distributed

from real_openrlhf.actors.policy.safe_pickles import check_pickles
from real_openrlhf.common import durable
from real_openrlhf.common.device import Device

logger = logging.getLogger(__name__)

_TAG = "deepspeed"
_CONVERTER = "deepspeed.checkpoint.ds_to_universal"


class ShardError(RuntimeError):
    """The shards of the policy could not be written or read; raised on every rank."""


# --- saving


def save_shards(engine: Any, path: str, state: dict[str, Any]) -> None:
    """Write DeepSpeed's shards and this rank's `state` below `path`, and force them to the disk.

    engine: DeepSpeed's. Every rank fsyncs all files: on a shared file system, only the node that wrote a file can
    force it to the disk. A failure of one rank (a full disk) raises ShardError on all of them, after all collective
    calls, so that training can go on.
    """
    folder, rank = Path(path), distributed.get_rank()
    errors: list[Exception] = []
    # DeepSpeed makes the folder on rank 0 only, and the other ranks would wait forever if that failed.
    with _collected(errors):
        folder.mkdir(parents=True, exist_ok=True)
    _agree(errors, f"{folder} could not be made")
    with _deferred(engine, errors):
        engine.save_checkpoint(path, tag=_TAG, save_latest=False)
    with _collected(errors):
        torch.save(state, folder / f"rank_{rank}.pt")
    _agree(errors, "the policy's shards could not be written")
    with _collected(errors):
        durable.fsync_tree(folder)
    _agree(errors, "the policy's shards could not be forced to the disk")


@contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch reports a full disk as a RuntimeError
        errors.append(error)


@contextmanager
def _deferred(engine: Any, errors: list[Exception]) -> Iterator[None]:
    """Inside, DeepSpeed's writing calls collect their errors instead of raising them, since barriers follow them."""

    def guarded(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            with _collected(errors):
                method(*args, **kwargs)

        return call

    writer = engine.checkpoint_engine
    writer.save = guarded(writer.save)
    engine._copy_recovery_script = guarded(engine._copy_recovery_script)
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script


def _agree(errors: list[Exception], what: str) -> None:
    """Raise ShardError on every rank if one of them has errors."""
    mine = f"{type(errors[0]).__name__}: {errors[0]}" if errors else None
    everybody: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everybody, mine)
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(everybody) if error]
    if failed:
        raise ShardError(f"{what}; {'; '.join(failed)}")


# --- loading


def load_shards(engine: Any, path: str, *, scratch: str, seed: int) -> dict[str, Any]:
    """Load what `save_shards` wrote; returns this rank's state, ready for `restore_rng`.

    For another number of ranks the shards are converted first (DeepSpeed's universal checkpoints), below `scratch`,
    where 12 bytes per parameter are needed for a while. A rank that did not exist before gets rank 0's counters, and a
    new random state from (seed, update, rank). Raises ShardError if the shards cannot be loaded.
    """
    folder, rank = Path(path), distributed.get_rank()
    errors: list[Exception] = []
    with _collected(errors):
        check_pickles(sorted(folder.rglob("*.pt"))[rank :: distributed.get_world_size()])
    _agree(errors, f"{folder} is not loaded")
    wrote = len(list(folder.glob("rank_*.pt")))
    if wrote == distributed.get_world_size():
        _load(engine, folder)
    else:
        _load_converted(engine, folder, scratch)
    # Not weights_only: the states of NumPy's random numbers are arrays. `check_pickles` has seen the file.
    mine = folder / f"rank_{rank if rank < wrote else 0}.pt"
    state: dict[str, Any] = torch.load(mine, map_location="cpu", weights_only=False)
    if rank >= wrote:
        words = numpy.random.SeedSequence([seed, state["n_updates"], rank]).generate_state(1)
        transformers.set_seed(int(words[0]))
        logger.warning("rank %d is new: the checkpoint was written by %d ranks; new random numbers there", rank, wrote)
        state["rng"] = None
    distributed.barrier()
    return state


def _load(engine: Any, folder: Path) -> None:
    loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if loaded is None:
        raise ShardError(f"DeepSpeed loaded nothing from {folder}")


def _load_converted(engine: Any, folder: Path, scratch: str) -> None:
    """Convert on rank 0, load on all, remove the converted copy."""
    errors: list[Exception] = []
    target = [""]
    if distributed.get_rank() == 0:
        with _collected(errors):
            # It has the name of a temporary folder: if this process dies, the next start removes it.
            converted = Path(scratch) / durable.owned_name("tmp", "universal")
            target[0] = str(converted)
            convert(folder / _TAG, converted / _TAG)
    _agree(errors, f"{folder} could not be converted for {distributed.get_world_size()} ranks")
    distributed.broadcast_object_list(target, src=0)
    settings = engine._config
    before = settings.load_universal_checkpoint
    settings.load_universal_checkpoint = True
    try:
        _load(engine, Path(target[0]))
        if engine.zero_optimization_partition_weights():
            _mend_zero3(engine, Path(target[0]) / _TAG)
    finally:
        settings.load_universal_checkpoint = before
        distributed.barrier()
        if distributed.get_rank() == 0:
            durable.remove_tree(Path(target[0]))


def convert(shards: Path, target: Path) -> None:
    """Convert DeepSpeed's shards, of any number of ranks, to one file per parameter and state, in a separate process.

    If it fails, ShardError has the end of its output, and what it wrote is removed.
    """
    target.parent.mkdir(parents=True)
    command = [sys.executable, "-m", _CONVERTER, "--input_folder", str(shards), "--output_folder", str(target)]
    # The converter demands a description of the parallel layout, which plain data parallelism does not have.
    done = subprocess.run([*command, "--inject_missing_state"], capture_output=True, text=True, env=_converter_env())
    if done.returncode != 0:
        durable.remove_tree(target.parent)
        raise ShardError(f"{_CONVERTER} failed on {shards}: {done.stderr.strip()[-1500:]}")


def _converter_env() -> dict[str, str]:
    """The converter only moves tensors between files: it gets no GPU, and one thread in each of its processes."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _mend_zero3(engine: Any, folder: Path) -> None:
    """Repair two things that DeepSpeed's ZeRO-3 loader (0.19) takes from the first parameter group for all groups.

    See runtime/zero/stage3.py. The groups' settings: parameters without weight decay would get the others'. And
    `step`: all groups would share one tensor, which torch's Adam would then raise once per group.
    """
    optimizer = engine.optimizer.optimizer
    # Not weights_only: converted here from shards that `check_pickles` has seen.
    saved = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    for group, was in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in was.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


# --- random numbers


def rng_state(device: Device) -> dict[str, Any]:
    """States of this process's random number generators: torch's, the device's, python's and numpy's."""
    return {
        "torch": torch.get_rng_state(),
        "device": device.rng_state(),
        "python": json.dumps(random.getstate()),
        "numpy": numpy.random.get_state(),
    }


def restore_rng(state: dict[str, Any] | None, device: Device) -> None:
    """Restore what `rng_state` returned; None leaves everything as it is."""
    if state is None:
        return
    torch.set_rng_state(state["torch"])
    device.set_rng_state(state.get("device"))
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(state["numpy"])
