"""Random decoders in memory, for the checks that need no folder; and groups of rollouts for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from examples.benchmark.protocol import Case
from examples.benchmark.rollouts import SCALE, make_group
from real_openrlhf.actors.policy.model import accept_packed_rows, outputs_of
from real_openrlhf.actors.policy.trainer import loss_inputs
from real_openrlhf.algo.batch import RealBatch, collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import TrainGroup, group_scores
from tests.gpu.harness import DEVICE

MAX_BYTES = 2**30


def random_model(
    *,
    hidden: int = 1024,
    layers: int = 8,
    heads: int = 16,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocabulary: int = 8192,
    seed: int = 0,
    tied: bool = True,
) -> PreTrainedModel:
    """A Qwen3 in fp32 on the GPU whose log-probs differ from token to token by some nats."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.05,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(config)
    accept_packed_rows(model)
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with the same weights, rounded to the dtype."""
    return copy.deepcopy(model).to(dtype)


def train_group(case: Case, *, vocabulary: int, seed: int = 0) -> TrainGroup:
    group = make_group(case, seed=seed, vocabulary=vocabulary)
    target = SCALE.target(group.label)
    coefficients = RealObjective(beta=1.0)(group_scores(group, SCALE.tensor(), target))
    return TrainGroup(group=group, target=target, coefficients=coefficients)


def packed_step(model: Any, group: TrainGroup) -> tuple[torch.Tensor, float, RealBatch]:
    """Forward, REAL loss and backward of one packed row; (log-probs [N, T], loss, batch), gradients on the model."""
    rows = rows_of([group])
    batch = collate(rows).to(DEVICE)
    outputs = outputs_of(model, batch, temperature=1.0, max_bytes=MAX_BYTES)
    inputs = loss_inputs(batch, outputs.token_logprobs, outputs.label_logprobs, SCALE.tensor(), outputs.entropy)
    counts = denominators_of(rows, trains_score_token=False)
    loss = policy_loss(inputs, options=LossOptions(), denominators=counts).loss
    loss.backward()
    return outputs.token_logprobs.detach(), float(loss.detach()), batch


def separate_step(model: Any, group: TrainGroup) -> tuple[torch.Tensor, float]:
    """The same by transformers' own forward, a row of prompt and response per rollout, whole logits in fp32."""
    rows = rows_of([group])
    batch = collate(rows).to(DEVICE)
    logprobs, labels = [], []
    prompt = group.group.prompt_ids.to(DEVICE)
    for i, row in enumerate(rows):
        ids = torch.cat([prompt, batch.response_ids[i, : row.length]])[None]
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, len(prompt) - 1 : -1]
        table = logits.float().log_softmax(-1)
        logprobs.append(table.gather(1, ids[0, len(prompt) :, None])[:, 0])
        position = row.rollout.reading.position
        tokens = row.rollout.score_rows.token_ids[0].to(DEVICE)
        labels.append(table[position, tokens] if position is not None else table.new_zeros(len(tokens)))
    token_logprobs = torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True)
    inputs = loss_inputs(batch, token_logprobs, torch.stack(labels), SCALE.tensor())
    counts = denominators_of(rows, trains_score_token=False)
    loss = policy_loss(inputs, options=LossOptions(), denominators=counts).loss
    loss.backward()
    return token_logprobs.detach(), float(loss.detach())


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients as one vector in float32; they are taken off the model."""
    flat = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat
