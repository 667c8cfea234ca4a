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
    """The longest row of a forward pass. logits: tokens whose logits are needed. last: an update has no other row."""

    tokens: int
    logits: int
    last: bool = False

    @classmethod
    def of(cls, config: Config, prompt: int) -> PackedRow:
        """As many rollouts as go through together, all of the longest; prompt: tokens of the longest."""
        rollouts, k = config.rollouts_per_pass, config.rollout.n_samples_per_prompt
        response = config.rollout.max_new_tokens
        prompts = -(-rollouts // k) * prompt
        tokens = min(prompts + rollouts * response, max(config.train.max_tokens_per_gpu, prompt + response))
        logits = min(rollouts * response, max(tokens - prompt, response))
        return cls(tokens=tokens, logits=logits, last=logits >= config.samples_per_update // config.ranks * response)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes.

    kept         of all layers, from the forward pass on: what autograd saves, or under checkpointing the layers' inputs
    layer        of one layer that is computed again, with the temporaries of its backward pass
    forward      most that the output layer takes above all this in its forward pass
    backward     the same, in its backward pass
    """

    kept: int
    layer: int
    forward: int
    backward: int


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
    forward, backward = output_layer(
        decoder, row.logits, itemsize=itemsize, logit_bytes=logit_bytes, trained=not shape.frozen
    )
    return Activations(
        kept=decoder.layers * (inputs if checkpointed else per_layer) + inputs,
        layer=(per_layer if checkpointed else 0) + work,
        forward=forward,
        backward=backward,
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


def output_layer(
    decoder: DecoderShape, rows: int, *, itemsize: int, logit_bytes: int, trained: bool
) -> tuple[int, int]:
    """The most that `LogprobHead` takes in its forward pass, and in its backward pass.

    Probabilities are kept up to half of the bound, in chunks of an eighth. The gradient of the weight adds up in fp32
    and is rounded at the end.
    """
    logits, half, of_a_row = _FP32 * rows * decoder.vocabulary, logit_bytes // 2, _FP32 * decoder.vocabulary
    chunk = max(logit_bytes // 8 // of_a_row, 1) * of_a_row
    hidden = rows * decoder.hidden * itemsize
    weight = decoder.vocabulary * decoder.hidden * _FP32 if trained else 0
    kept = min(half // chunk * chunk, logits)
    backward = weight + max(kept + min(chunk, logits) * itemsize // _FP32, weight // _FP32 * itemsize)
    return hidden + _chunks_peak(logits, chunk, half), 2 * hidden + backward


def _chunks_peak(logits: int, chunk: int, half: int) -> int:
    """Of a chunk, logits and log-softmax are made while the log-softmax of the chunk before is still there, and its

    probabilities, kept or not.
    """
    peak = kept = before = stray = 0
    for start in range(0, logits, chunk):
        size = min(chunk, logits - start)
        peak = max(peak, kept + before + stray + 2 * size)
        before, stray = size, 0 if kept + size <= half else size
        kept += size - stray
    return peak
