"""Settings of a rollout engine, and how its answers become rollouts: everything about it that needs no vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from real_openrlhf.algo.bound_scale import BoundScale
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import SPLIT_ANCHOR, Rollout
from real_openrlhf.common.device import Device

# vLLM's own bound on SamplingParams.logprob_token_ids.
MAX_READ_TOKENS = 128
# vLLM silently raises smaller positive temperatures to this one.
MIN_TEMPERATURE = 0.01


class EngineSpecError(ValueError):
    """Settings that an engine cannot have, or a request that it cannot answer."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One rollout engine.

    model                   folder or hub name; its config, tokenizer and generation config are read
    device                  stack and dtype
    bound                   the score scale, bound to the model's tokenizer
    max_model_len           prompt and response together, in tokens
    tensor_parallel_size    workers of this engine
    enable_prefix_caching   compute the prompt of a group once
    gpu_memory_utilization  share of the GPU's memory for weights and KV cache; unused on CPU
    seed                    for requests without one; every engine needs another
    load_format             "dummy": random weights, so that the first sync is really checked; "auto": the model's
    logprobs_mode           see `logprobs_mode_for`
    enable_sleep            the engine can free its GPU memory between generation and weight sync
    max_num_seqs, max_num_batched_tokens, fp32_head   see `Device.engine_options`
    """

    model: str
    device: Device
    bound: BoundScale
    max_model_len: int
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool = True
    enforce_eager: bool = True
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    load_format: str = "dummy"
    logprobs_mode: str = "raw_logprobs"
    trust_remote_code: bool = False
    enable_sleep: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    fp32_head: bool = True

    def __post_init__(self) -> None:
        if self.load_format not in ("dummy", "auto"):
            raise EngineSpecError(f"load_format must be 'dummy' or 'auto', got {self.load_format!r}")
        if self.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise EngineSpecError(
                f"logprobs_mode must be 'raw_logprobs' or 'processed_logprobs', got {self.logprobs_mode!r}"
            )
        if self.max_model_len < 2 or self.tensor_parallel_size < 1:
            raise EngineSpecError(
                f"max_model_len ({self.max_model_len}) must be at least 2 and "
                f"tensor_parallel_size ({self.tensor_parallel_size}) at least 1"
            )
        if self.enable_sleep and not self.device.is_cuda:
            raise EngineSpecError("vLLM has no sleep mode on a CPU (--vllm.enable_sleep)")
        check_read_tokens(self.bound)

    @property
    def read_token_ids(self) -> list[int]:
        """Tokens whose log-probs come back at every generated position."""
        return self.bound.read_token_ids


def check_read_tokens(bound: BoundScale) -> None:
    """EngineSpecError for a scale with more different tokens than an engine returns log-probs of."""
    n_read = len(bound.read_token_ids)
    if n_read > MAX_READ_TOKENS:
        raise EngineSpecError(
            f"the scale's labels have {n_read} different tokens over all anchors; vLLM returns log-probs of at "
            f"most {MAX_READ_TOKENS} chosen tokens. Use fewer labels or fewer anchors."
        )


def logprobs_mode_for(temperature: float, top_p: float) -> str:
    """The vLLM mode that gives log softmax(logits / temperature) over the full vocabulary.

    "raw_logprobs" is taken before temperature and top-p: right at temperature 1, for any top_p.
    "processed_logprobs" is taken after both: right for any temperature, at top_p 1 (below, tokens
    outside of the nucleus have -inf). At temperature 0 (greedy) both give temperature 1.

    Raises EngineSpecError for a temperature other than 0 or 1 together with top_p < 1: no mode gives that.
    """
    if temperature in (0.0, 1.0):
        return "raw_logprobs"
    if top_p < 1:
        raise EngineSpecError(
            f"temperature {temperature:g} with top_p {top_p:g}: the engine cannot return full-vocabulary log-probs "
            "for this pair; set top_p to 1, or the temperature to 1"
        )
    return "processed_logprobs"


def check_sampling(sampling: Sampling, logprobs_mode: str) -> None:
    """EngineSpecError for requests whose log-probs would not be those of the full vocabulary at their temperature."""
    t, top_p = sampling.temperature, sampling.top_p
    if sampling.n < 1 or sampling.max_new_tokens < 1:
        raise EngineSpecError(f"n ({sampling.n}) and max_new_tokens ({sampling.max_new_tokens}) must be at least 1")
    if not 0 < top_p <= 1:
        raise EngineSpecError(f"top_p must be above 0 and at most 1, got {top_p}")
    if t != 0 and not t >= MIN_TEMPERATURE:
        raise EngineSpecError(f"the temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {t}")
    if t == 0:
        if sampling.n > 1:
            raise EngineSpecError(f"temperature 0 gives the same response {sampling.n} times; set n to 1")
    elif logprobs_mode == "raw_logprobs" and t != 1:
        raise EngineSpecError(
            f"this engine returns log-probs at temperature 1 (raw_logprobs), but temperature {t:g} was asked for; "
            "build it with logprobs_mode 'processed_logprobs', or use temperature 1 or 0"
        )
    elif logprobs_mode == "processed_logprobs" and top_p < 1:
        raise EngineSpecError(
            f"this engine returns log-probs after top-p (processed_logprobs): tokens outside of top_p {top_p:g} would "
            "have probability 0; use top_p 1"
        )


def request_seed(seed: int, row: int, sample: int) -> int:
    """Seed of one sampled response, in [0, 2^63).

    seed    made from the run's seed and the step by the caller
    row     of the prompt in its data set
    sample  0 .. K-1

    vLLM's own rule for n > 1 is seed + k, by which neighbouring seeds share responses.
    """
    digest = hashlib.blake2b(f"{seed}/{row}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_rollout(
    reader: ScoreReader,
    read_token_ids: Sequence[int],
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str,
    given_ids: Sequence[int] = (),
) -> Rollout:
    """A rollout from what the engine returned.

    token_ids   [T] the sampled tokens
    logprobs    [T * (1 + R)] flat: for each position the sampled token's, then those of read_token_ids in order;
                NaN where the engine did not return one
    given_ids   [G] the response's first tokens, if they were forced instead of sampled: the rollout then has all
                G + T tokens, with NaN as the log-probs of the first G

    Score rows in branches are NaN until `with_forced` gets the log-probs after `forced_prefixes`.
    """
    width = 1 + len(read_token_ids)
    if len(logprobs) != len(token_ids) * width:
        raise RuntimeError(
            f"the engine returned {len(logprobs)} log-probs for {len(token_ids)} tokens and {width} columns"
        )
    table = torch.tensor(logprobs, dtype=torch.float32).view(-1, width)
    _check_finite(table[:, 0])
    if given_ids:
        table = torch.cat([table.new_full((len(given_ids), width), float("nan")), table])
        token_ids = [*given_ids, *token_ids]
    reading = reader.read(token_ids)
    if reading.position is not None and reading.position < len(given_ids):
        # The score that counts is in the forced tokens, where no log-probs were read.
        reading = replace(reading, position=None, label_index=None, reason=SPLIT_ANCHOR)
    n_labels = len(reader.bound.scale)
    if reading.position is None or reading.anchor_index is None:
        rows, score_logprobs = ScoreRows.empty(n_labels), torch.zeros(0, n_labels)
    else:
        trie = reader.bound.anchors[reading.anchor_index].trie
        rows = ScoreRows.of(trie, token_ids, reading.position)
        score_logprobs = torch.full(rows.token_ids.shape, float("nan"))
        drawn = rows.sequence < rows.n_rollouts
        score_logprobs[drawn] = _candidates(table[rows.position[drawn]], read_token_ids, rows.token_ids[drawn])
    return Rollout(
        token_ids=torch.tensor(list(token_ids), dtype=torch.int64),
        logprobs=table[:, 0].clone(),
        reading=reading,
        score_rows=rows,
        score_logprobs=score_logprobs,
        finish_reason=finish_reason,
        text=reader.tokenizer.decode(list(token_ids), skip_special_tokens=False),
    )


def forced_prefixes(rollout: Rollout) -> list[list[int]]:
    """The tokens to put after the prompt to read the score rows in branches: one prefix per row, in the rows' order.

    Empty for scales of single tokens, and for a response that passes every inner node of the trie.
    """
    rows, response = rollout.score_rows, rollout.token_ids.tolist()
    return [rows.prefix(row, response) for row in rows.forced]


def with_forced(rollout: Rollout, read_token_ids: Sequence[int], logprobs: Sequence[Sequence[float]]) -> Rollout:
    """The rollout with all its score rows.

    logprobs: for each prefix of `forced_prefixes`, [1 + R] log-probs of the next token, as in `make_rollout`.
    """
    rows = rollout.score_rows
    table = torch.tensor([list(row) for row in logprobs], dtype=torch.float32)
    if table.shape != (len(rows.forced), 1 + len(read_token_ids)):
        raise RuntimeError(
            f"the engine returned log-probs {tuple(table.shape)} for {len(rows.forced)} forced prefixes and "
            f"{1 + len(read_token_ids)} columns"
        )
    _check_finite(table[:, 0])
    score_logprobs = rollout.score_logprobs.clone()
    score_logprobs[rows.forced] = _candidates(table, read_token_ids, rows.token_ids[rows.forced])
    return replace(rollout, score_logprobs=score_logprobs)


def _candidates(table: Tensor, read_token_ids: Sequence[int], token_ids: Tensor) -> Tensor:
    """[R, C] log-probs of the candidate tokens, -inf at padding."""
    column = {token: 1 + i for i, token in enumerate(read_token_ids)}
    columns = torch.tensor([[column.get(token, 0) for token in row] for row in token_ids.tolist()])
    return table.gather(1, columns).masked_fill(token_ids < 0, float("-inf"))


def _check_finite(logprobs: Tensor) -> None:
    if not bool(torch.isfinite(logprobs).all()):
        raise RuntimeError("the engine returned log-probs that are not finite: the weights hold NaN or infinity")
