"""Code that all contestants share: settings, the objective, and how the sizes of a case are set."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from examples.benchmark.protocol import Case
from examples.benchmark.timers import Timers
from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.algo.types import Group
from real_openrlhf.common.device import Device
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.openrlhf_args import to_openrlhf_args

ADDRESS = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings from which a contestant is built.

    logits_mb  for this project's step only, see `--real.logits_mb`; None: the device's default
    liger      --ds.use_liger_kernel for all contestants that have it; None: on a GPU if the package is installed
    """

    model: str
    device: Device
    seed: int
    learning_rate: float
    logits_mb: int | None
    liger: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a step besides its time; see `Measured`."""

    loss: float
    facts: dict[str, float]


class Contestant(Protocol):
    """overrides: what was changed in other people's code, and why. network: the transformers model that trains."""

    overrides: list[str]
    args: SimpleNamespace
    timers: Timers

    @property
    def network(self) -> Any: ...

    def prepare(self, case: Case, group: Group) -> None:
        """Do everything that is not part of a step: set sizes, and bring rollouts into the form that engines return."""

    def step(self) -> Outcome:
        """One training step on the group, with one optimizer update; the timers record its phases."""


def arguments(setup: Setup) -> SimpleNamespace:
    """OpenRLHF's arguments for all contestants: ZeRO-2, AdamW, clipping at 1, one update on one prompt."""
    config = build_config(
        {
            "actor.model_name_or_path": setup.model,
            "actor.adam.lr": setup.learning_rate,
            "ds.zero_stage": 2,
            "rollout.batch_size": 1,
            "rollout.n_samples_per_prompt": 2,
            "train.micro_batch_size": 2,
            "train.seed": setup.seed,
            "ckpt.output_dir": "unused",
        }
    )
    args = to_openrlhf_args(
        config,
        device_dtype=setup.device.dtype_name,
        attn=setup.device.attn_implementation,
        sync_backend=setup.device.dist_backend,
    )
    found = setup.device.is_cuda and importlib.util.find_spec("liger_kernel") is not None
    args.ds.use_liger_kernel = found if setup.liger is None else setup.liger
    return args


def set_sizes(args: SimpleNamespace, case: Case) -> None:
    """Set the sizes of a case in the arguments, which OpenRLHF's classes and ours read at each step."""
    args.rollout.n_samples_per_prompt = case.samples
    args.rollout.micro_batch_size = case.micro_batch
    args.train.batch_size = case.samples
    args.train.micro_batch_size = case.micro_batch


def set_checkpointing(network: Any, args: SimpleNamespace, case: Case) -> None:
    """Turn gradient checkpointing on or off, in the form that the arguments name."""
    args.actor.gradient_checkpointing_enable = case.gradient_checkpointing
    if case.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": args.actor.gradient_checkpointing_reentrant})
    else:
        network.gradient_checkpointing_disable()


def optimizer_config(args: SimpleNamespace) -> dict[str, Any]:
    """The optimizer as `DeepspeedStrategy.prepare` takes it; `arguments` keeps the learning rate constant."""
    return {
        "optim": "adam",
        "adam": vars(args.actor.adam),
        "lr_scheduler": args.actor.lr_scheduler,
        "lr_warmup_ratio": args.actor.lr_warmup_ratio,
        "min_lr_ratio": args.actor.min_lr_ratio,
        "max_norm": args.actor.max_norm,
        "scheduler_steps": MAX_STEPS,
    }


# Number of optimizer steps for the learning-rate schedule, which is constant.
MAX_STEPS = 1000


def single_rank() -> tuple[str, int]:
    """Set environment variables for a process group of one rank; returns its address and port."""
    port = free_port()
    os.environ.update(
        {"MASTER_ADDR": ADDRESS, "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    )
    return ADDRESS, port
