"""The policy's model: one forward that yields what the fused loss needs, and no more logits than that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from openrlhf.models import Actor
from openrlhf.models.actor import _patch_zero3_weight_mapping
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from real_openrlhf.actors.device import Device
from real_openrlhf.algo.batch import RealBatch
from real_openrlhf.algo.dtypes import upcast


@dataclass(frozen=True, kw_only=True)
class PolicyOutputs:
    """
    token_logprobs  [N, T] float32 with grad, 0 at padding
    label_logprobs  [N, S] float32 with grad, 0 where the score cannot be read
    entropy         [N, T] float32, 0 at padding
    logits          [N + B, T, V] at temperature 1, in the model's dtype; the last B of the branches
    """

    token_logprobs: Tensor
    label_logprobs: Tensor
    entropy: Tensor
    logits: Tensor


class PolicyModel(Actor):
    """OpenRLHF's Actor whose forward takes a RealBatch.

    The model is built here and handed to Actor, because Actor's own loading knows bf16 and fp16
    only and trusts remote code.
    """

    def __init__(
        self, path: str, *, device: Device, attn_implementation: str, ds_config: dict[str, Any], temperature: float
    ) -> None:
        zero3 = ds_config["zero_optimization"]["stage"] == 3
        if zero3:
            _patch_zero3_weight_mapping()
        # Alive while from_pretrained runs: it is how transformers learns of ZeRO-3.
        hf_config = HfDeepSpeedConfig(ds_config) if zero3 else None
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=device.torch_dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
        del hf_config
        model.config.use_cache = False
        super().__init__(model, temperature=temperature)
        self.packing_samples = False
        self.is_vlm = False

    def forward(self, batch: RealBatch, *, entropy_grad: bool = False) -> PolicyOutputs:
        """One forward of the network. entropy_grad: the entropy bonus needs a gradient."""
        attention_mask = batch.attention_mask.long()
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(
            batch.input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=batch.logit_columns,
            use_cache=False,
        )["logits"]
        return outputs_from_logits(logits, batch, temperature=self.temperature, entropy_grad=entropy_grad)


def outputs_from_logits(
    logits: Tensor, batch: RealBatch, *, temperature: float, entropy_grad: bool = False
) -> PolicyOutputs:
    """[N + B, T, V] logits of the response columns -> PolicyOutputs, in fp32 (or wider) at the temperature."""
    scaled = upcast(logits[: len(batch.response_ids)])
    if temperature != 1.0:
        scaled = scaled / temperature
    normaliser = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, batch.response_ids[..., None])[..., 0]
    token_logprobs = (chosen - normaliser).masked_fill(~batch.response_mask, 0.0)

    rows = batch.score_rows
    candidates = rows.gather(logits[rows.sequence, rows.position], temperature)
    label_logprobs = rows.label_logprobs(candidates)

    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        # Row by row: p * logits for all rows at once would double the memory of the logits.
        entropy = torch.stack([n - (row.softmax(-1) * row).sum(-1) for row, n in zip(scaled, normaliser)])
        entropy = entropy.masked_fill(~batch.response_mask, 0.0)
    return PolicyOutputs(token_logprobs=token_logprobs, label_logprobs=label_logprobs, entropy=entropy, logits=logits)
