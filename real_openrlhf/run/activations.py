"""What a forward pass keeps for its backward pass, and what the output layer takes: estimates, by the layers' formulas.

tests/unit/run/test_activations.py counts the tensors that autograd saves; the H100's peaks (tests/gpu/results/h100) are
met to a few hundredths.
"""

from __future__ import annotations

from dataclasses import dataclass

from real_openrlhf.config.schema import Config
from real_openrlhf.run.model_shape import DecoderShape, ModelShape

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """The longest row of a forward pass. logits: tokens whose logits are needed."""

    tokens: int
    logits: int

    @classmethod
    def of(cls, config: Config, prompt: int) -> PackedRow:
        """As many rollouts as go through together, all of the longest; prompt: tokens of the longest."""
        rollouts, k = config.rollouts_per_pass, config.rollout.n_samples_per_prompt
        response = config.rollout.max_new_tokens
        prompts = -(-rollouts // k) * prompt
        tokens = min(prompts + rollouts * response, max(config.train.max_tokens_per_gpu, prompt + response))
        return cls(tokens=tokens, logits=min(rollouts * response, max(tokens - prompt, response)))


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes.

    kept         of all layers, from the forward pass on: what autograd saves, or under checkpointing the layers' inputs
    layer        of one layer that is computed again, with the temporaries of its backward pass
    head         most that the output layer takes above all this, in its forward or its backward pass
    """

    kept: int
    layer: int
    head: int


def activations(
    config: Config, shape: ModelShape, row: PackedRow, *, itemsize: int, liger: bool, logit_bytes: int
) -> Activations | None:
    """None for a model whose layers are of another kind."""
    decoder = shape.decoder
    if decoder is None:
        return None
    per_layer = row.tokens * kept_per_token(shape, itemsize=itemsize, liger=liger)
    checkpointed = config.actor.gradient_checkpointing_enable
    inputs = row.tokens * decoder.hidden * itemsize
    # Gradients of the feed-forward layer's three, and of a norm's fp32 copies.
    work = row.tokens * (3 * decoder.intermediate * itemsize + 3 * decoder.hidden * _FP32)
    return Activations(
        kept=decoder.layers * (inputs if checkpointed else per_layer) + inputs,
        layer=(per_layer if checkpointed else 0) + work,
        head=output_layer(decoder, row.logits, itemsize=itemsize, logit_bytes=logit_bytes, trained=not shape.frozen),
    )


def kept_per_token(shape: ModelShape, *, itemsize: int, liger: bool) -> int:
    """Bytes that autograd saves of a token in one layer."""
    decoder = shape.decoder
    assert decoder is not None
    query, key = decoder.query_width, decoder.key_width
    # transformers' RMSNorm: a copy in fp32, its quotient by the root in the weights' dtype. Liger's: its input.
    norm = itemsize if liger else _FP32 + itemsize
    norms = shape.norms * decoder.hidden * (norm + itemsize)  # what comes out is the linear layers' input
    if shape.head_norms:
        norms += (query + key) * norm
    attention = itemsize * (2 * query + 2 * key) + _FP32 * decoder.heads  # q, k, v, output; log-sum-exps
    feed_forward = itemsize * decoder.intermediate * (3 if liger else 4)  # gate, up, product; and the gate's function
    return norms + attention + feed_forward


def output_layer(decoder: DecoderShape, rows: int, *, itemsize: int, logit_bytes: int, trained: bool) -> int:
    """The most that `LogprobHead` takes: in its forward pass, or when its weight's gradient has come in fp32.

    Probabilities are kept up to half of the bound, in chunks of an eighth. Of a chunk's size, three are alive at once
    besides, and a fourth where the chunk before was not kept.
    """
    logits, half = _FP32 * rows * decoder.vocabulary, logit_bytes // 2
    chunk = min(max(logit_bytes // 8, _FP32 * decoder.vocabulary), logits)
    before = max(logits - chunk, 0) // max(chunk, 1) * chunk
    forward = half + 4 * chunk if logits > half else before + 3 * chunk
    hidden = 2 * rows * decoder.hidden * itemsize  # the rows, and their gradient
    weight = decoder.vocabulary * decoder.hidden * _FP32 if trained else 0
    backward = weight + max(min(half, logits) + chunk // 2, weight // _FP32 * itemsize)
    return hidden + max(forward, backward)
