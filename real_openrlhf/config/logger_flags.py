"""Flags of what a run records, and where (`controller.run_log`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from real_openrlhf.config.flags import Section, flag


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Section):
    prefix: ClassVar[str] = "logger.wandb"
    project: str = flag("real_openrlhf", "W&B project")
    run_name: str | None = flag(None, "W&B run name; none: W&B's choice")
    group: str | None = flag(None, "W&B group")
    org: str | None = flag(None, "W&B team or user")
    mode: Literal["disabled", "online", "offline"] = flag("disabled", "whether and how to log to W&B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "disabled" and not self.project:
            self.reject("project", "is empty; name a project")


@dataclass(frozen=True, kw_only=True)
class LoggerConfig(Section):
    prefix: ClassVar[str] = "logger"
    logging_steps: int = flag(1, "log every so many steps", ge=1)
    tensorboard_dir: str | None = flag(None, "write TensorBoard events here", path=True)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    samples: int = flag(4, "judgements per step that are written out", ge=0)
    term_grad_norm_steps: int = flag(10, "log the gradient norm of each loss term every so many steps; 0: never", ge=0)
    term_grad_norm_at: Literal["logits", "parameters"] = flag(
        "logits",
        "where to measure it; parameters: there too; needs two more backward passes and memory for two gradients",
    )
    progress: bool = flag(True, "show a progress bar")
