"""Scripted tokenizers, groups and loss inputs for the tests of the algorithm. No file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.algo.batch import RealBatch
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.target import Target
from real_openrlhf.algo.types import Coefficients, Group, LossInputs, Rollout, ScoreReading, Targets, TrainGroup


class PieceTokenizer:
    """Encodes by the longest matching piece, decodes by concatenation of bytes (as byte-level BPE does).

    Pieces are strings or bytes; bytes without a piece are an error. cleans_up: the default of decode.
    `n_decodes` counts calls, `n_decoded` the tokens in them.
    """

    def __init__(self, pieces: Sequence[str | bytes], *, cleans_up: bool = False) -> None:
        self.pieces = [p if isinstance(p, bytes) else p.encode() for p in pieces]
        self.ids = {p: i for i, p in enumerate(self.pieces)}
        self.cleans_up = cleans_up
        self.n_decodes = 0
        self.n_decoded = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        data = text.encode()
        out: list[int] = []
        while data:
            best = max((p for p in self.pieces if p and data.startswith(p)), key=len, default=None)
            assert best is not None, f"no piece for {data!r}"
            out.append(self.ids[best])
            data = data[len(best) :]
        return out

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        self.n_decodes += 1
        self.n_decoded += len(token_ids)
        text = b"".join(self.pieces[i] for i in token_ids).decode(errors="replace")
        return text.replace(" :", ":") if kwargs.get("clean_up_tokenization_spaces", self.cleans_up) else text

    def id(self, piece: str) -> int:
        return self.ids[piece.encode()]


class WordTokenizer:
    """Word level: splits at spaces, joins with one space, unknown words become <unk> (id 0)."""

    def __init__(self, words: str) -> None:
        self.words = ["<unk>", *words.split()]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self.words.index(w) if w in self.words else 0 for w in text.split()]

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str:
        return " ".join(self.words[i] for i in token_ids)


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient of a leaf, which must have one."""
    assert tensor.grad is not None
    return tensor.grad


ANCHOR = "So the overall score is "
ANCHOR_WORDS = ["So", " the", " overall", " score", " is"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzSG", " ", "\n", ".", ",", "/", "!"]


def merged_tokenizer(extra: Sequence[str | bytes] = ()) -> PieceTokenizer:
    """Space and digit are one token, as in GPT-2's vocabulary. Id 0 ends the text."""
    digits = [*"0123456789", *(f" {d}" for d in range(10))]
    return PieceTokenizer(["<eos>", *ANCHOR_WORDS, *digits, *LETTERS, *extra])


def spaced_tokenizer(extra: Sequence[str | bytes] = ()) -> PieceTokenizer:
    """Space and digit are two tokens, as in Qwen's and Llama 3's vocabularies. Id 0 ends the text."""
    return PieceTokenizer(["<eos>", *ANCHOR_WORDS, *"0123456789", *LETTERS, *extra])


def reader_of(tokenizer: Any, scale: str = "1-5", anchors: Sequence[str] = (ANCHOR,)) -> ScoreReader:
    return ScoreReader.build(bind_scale(ScoreScale.parse(scale), tokenizer, anchors), tokenizer, {0})


def make_rollout(
    token_ids: Sequence[int],
    *,
    position: int | None = None,
    label: int | None = None,
    n_labels: int = 3,
    score_logprobs: Tensor | None = None,
    logprobs: Tensor | None = None,
    reason: str | None = None,
) -> Rollout:
    """A rollout with labels at ids 1..n_labels; by default log-probs -0.1 (i + 1) and a uniform score row."""
    length = len(token_ids)
    if position is None:
        rows, reason = ScoreRows.empty(n_labels), reason or "no_anchor"
        score_logprobs = torch.zeros(0, n_labels)
    else:
        rows = ScoreRows.single(position, range(1, n_labels + 1))
        reason = reason or ("off_scale" if label is None else None)
        if score_logprobs is None:
            score_logprobs = torch.full((1, n_labels), 1 / (n_labels + 1)).log()
    return Rollout(
        token_ids=torch.tensor(list(token_ids), dtype=torch.int64),
        logprobs=-0.1 * torch.arange(1.0, length + 1) if logprobs is None else logprobs,
        reading=ScoreReading(
            position=position, label_index=label, reason=reason, anchor_index=None if position is None else 0
        ),
        score_rows=rows,
        score_logprobs=score_logprobs,
        finish_reason="stop",
    )


def make_group(prompt: Sequence[int], rollouts: Sequence[Rollout], *, label: float = 2.0, row: int = 0) -> Group:
    return Group(
        prompt_ids=torch.tensor(list(prompt)), label=label, rollouts=tuple(rollouts), row=row, weight_version=0
    )


def make_train_group(group: Group, scale: ScoreScale, **coefficients: Sequence[float]) -> TrainGroup:
    """Coefficients not named are 0."""
    names = ("cot", "score", "squared_error", "likelihood", "rewards", "advantages")
    values: dict[str, Any] = {
        n: torch.tensor(list(coefficients.get(n, [0.0] * len(group))), dtype=torch.float64) for n in names
    }
    return TrainGroup(
        group=group, target=scale.target(group.label), coefficients=Coefficients(**values, zero_variance=False)
    )


def make_inputs(token_logprobs: Tensor, label_logprobs: Tensor, **fields: Any) -> LossInputs:
    """Loss inputs [N, T], [N, S]: all readable, the last token is the score, targets on values 1..S, label 2."""
    n, width = token_logprobs.shape
    dtype = torch.float64 if token_logprobs.dtype == torch.float64 else torch.float32
    score_mask = torch.zeros(n, width, dtype=torch.bool)
    score_mask[:, -1] = True
    zeros = torch.zeros(n, dtype=dtype)
    defaults: dict[str, Any] = {
        "readable": torch.ones(n, dtype=torch.bool),
        "cot_mask": ~score_mask,
        "score_mask": score_mask,
        "response_mask": torch.ones(n, width, dtype=torch.bool),
        "cot": zeros,
        "score": zeros,
        "squared_error": zeros,
        "likelihood": zeros,
        "targets": Targets.repeat(Target(value=2.0, low=1, high=1, weight=0.0), n),
        "values": torch.arange(1, label_logprobs.shape[1] + 1, dtype=torch.float64),
    }
    return LossInputs(token_logprobs=token_logprobs, label_logprobs=label_logprobs, **(defaults | fields))


def plain_rows(batch: RealBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The batch without sharing: ids and mask [N + B, P + W], and the W columns whose logits predict the responses.

    A row is [left-padded prompt | right-padded response]; the last B are the branches of the score rows.
    """
    tokens = iter(batch.token_ids.split([n for g in batch.layout.groups for n in (g.prompt, *g.responses)]))
    rows, forced, start = [], [], 0
    for group in batch.layout.groups:
        prompt = next(tokens)
        sequences = [(prompt, next(tokens)) for _ in group.responses]
        n = 0  # rollouts of the group: what is not a branch of one of them
        while n + sum(start <= b.rollout < start + n for b in batch.score_rows.branches) < len(sequences):
            n += 1
        rows, forced, start = rows + sequences[:n], forced + sequences[n:], start + n
    rows += forced
    before, width = max(len(prompt) for prompt, _ in rows), max(1, max(len(response) for _, response in rows))
    ids = torch.zeros(len(rows), before + width, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        here = slice(before - len(prompt), before + len(response))
        ids[i, here], mask[i, here] = torch.cat([prompt, response]), True
    return ids, mask, torch.arange(before - 1, before + width - 1)


class TinyPolicy(torch.nn.Module):
    """Logits from the running mean of the embeddings seen so far: causal, and blind to masked columns."""

    def __init__(self, vocabulary: int = 8, width: int = 6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embed = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator, dtype=dtype))
        self.head = torch.nn.Parameter(torch.randn(width, vocabulary, generator=generator, dtype=dtype))

    def forward(self, batch: RealBatch) -> tuple[Tensor, Tensor, Tensor]:
        """-> token log-probs [N, T], label log-probs [N, S], entropy [N, T]."""
        input_ids, attention_mask, columns = plain_rows(batch)
        mask = attention_mask[..., None].to(self.embed.dtype)
        seen = (self.embed[input_ids] * mask).cumsum(1) / mask.cumsum(1).clamp(min=1)
        logits = torch.tanh(seen)[:, columns] @ self.head
        n, width = batch.response_ids.shape
        logprobs = logits[:n, :width].log_softmax(-1)
        rows = batch.score_rows
        labels = rows.label_logprobs(rows.gather(logits[rows.sequence, rows.position]))
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, batch.response_ids[..., None])[..., 0], labels, entropy


def inputs_of(policy: torch.nn.Module, batch: RealBatch, values: Tensor, *, reference: bool = True) -> LossInputs:
    """A forward of the policy over a batch; reference log-probs are made from the token ids."""
    token_logprobs, label_logprobs, entropy = policy(batch)
    names = (
        *("readable", "cot_mask", "score_mask", "response_mask", "cot", "score", "squared_error", "likelihood"),
        *("targets", "rollout_logprobs"),
    )
    return LossInputs(
        token_logprobs=token_logprobs,
        label_logprobs=label_logprobs,
        values=values,
        ref_logprobs=-0.4 * (batch.response_ids + 1.0) if reference else None,
        entropy=entropy if reference else None,
        **{name: getattr(batch, name) for name in names},
    )


def random_groups(seed: int, n_groups: int, k: int, scale: ScoreScale) -> list[TrainGroup]:
    """Prompts of 1 to 4 tokens, responses of 1 to 6, readable or not, with random coefficients and log-probs."""
    rng = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    groups = []
    for row in range(n_groups):
        rollouts = []
        for _ in range(k):
            length = integer(1, 6)
            position = integer(0, length - 1) if integer(0, 3) else None
            rollouts.append(
                make_rollout(
                    torch.randint(0, 8, (length,), generator=rng).tolist(),
                    position=position,
                    n_labels=len(scale),
                    logprobs=-1.5 * torch.rand(length, generator=rng) - 0.5,
                )
            )
        label = scale.values[0] + (scale.values[-1] - scale.values[0]) * float(torch.rand((), generator=rng))
        group = make_group([integer(0, 7) for _ in range(integer(1, 4))], rollouts, label=label, row=row)
        names = ("cot", "score", "squared_error", "likelihood")
        coefficients = {name: torch.randn(k, generator=rng).tolist() for name in names}
        groups.append(make_train_group(group, scale, **coefficients))
    return groups
