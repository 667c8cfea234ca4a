"""Settings from which a rank of the policy is built. Imports neither deepspeed nor peft, since the driver makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.common.device import Device
from real_openrlhf.config.schema import LoraConfig


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """Everything a rank needs to build itself.

    args                 OpenRLHF's nested arguments (config.openrlhf_args)
    attn_implementation  "auto": the device's default
    values               the score scale's values
    max_steps            optimizer steps of the whole run, for the learning-rate schedule
    logits_mb            megabytes that logits may take in training; None: the device's default
    lora                 LoRA settings; with lora.rank 0 there are no adapters and all parameters are trained
    seed                 for the adapters' initial values
    text                 tokens of a training prompt, for the check of packed rows
    """

    path: str
    args: Any
    device: Device
    attn_implementation: str
    ranks_per_node: int
    values: tuple[float, ...]
    options: LossOptions
    trains_score_token: bool
    term_grad_norm_steps: int
    norms_at_parameters: bool
    max_steps: int
    bucket_bytes: int
    logits_mb: int | None
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 42
    text: tuple[int, ...] = ()

    @property
    def max_logit_bytes(self) -> int:
        """To be read in the actor, since its GPU decides."""
        return (self.logits_mb or self.device.logits_mb()) * 2**20

    @property
    def attention(self) -> str:
        """To be read in the actor, since the driver may run on a node without flash attention."""
        return self.attn_implementation if self.attn_implementation != "auto" else self.device.attn_implementation
