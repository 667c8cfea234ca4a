"""A judge on transformers, in this process: small models answer within seconds, where vLLM's start takes half a minute.

The same log-probs as the engine's, from the same tokens: log softmax of the logits over the full vocabulary, in fp32.
Greedy responses are the engine's too, but for near ties; sampled ones are other draws from the same distribution.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.actors.engine.spec import check_sampling, forced_prefixes, make_rollout, request_seed, with_forced
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Group, Rollout
from real_openrlhf.common.device import Device
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge.types import JudgeError

# Responses that are generated together, and the tokens of their prompts and responses: bounds on the KV cache.
MAX_ROWS = 64
MAX_TOKENS = 65536


class TransformersBackend:
    """A model of transformers, with its KV cache. See `JudgeBackend`; calls are answered one after the other.

    reader          the judge's tokenizer and scale
    max_model_len   prompt, response and forced anchor together
    device          "auto", "cpu" or "cuda"
    logprobs_mode   see `actors.engine.spec.logprobs_mode_for`
    """

    def __init__(
        self,
        model: str,
        reader: ScoreReader,
        *,
        max_model_len: int,
        device: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        resolved = Device.resolve(device)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                model, dtype=resolved.torch_dtype, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(f"{model}: transformers cannot load it: {error}") from error
        self._device = resolved.current()
        self._model: Any = loaded.to(self._device).eval()
        self._reader = reader
        self._read_ids = reader.bound.read_token_ids
        self.max_model_len = max_model_len
        self.logprobs_mode = logprobs_mode
        self._lock = threading.Lock()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Rows of one length follow each other, whatever their order in `prompts`."""
        check_sampling(sampling, self.logprobs_mode)
        room = sampling.max_new_tokens + self._reader.bound.extra_tokens
        for prompt in prompts:
            self._check_length(prompt, room)
        rollouts: dict[int, list[Rollout]] = {}
        with self._lock, torch.inference_mode():
            for part in _parts(prompts, sampling.n, room):
                for i, group in zip(part, self._respond([prompts[i] for i in part], sampling), strict=True):
                    rollouts[i] = group
        return [
            Group(
                prompt_ids=torch.tensor(prompt.token_ids, dtype=torch.int64),
                label=prompt.label,
                rollouts=tuple(rollouts[i]),
                row=prompt.row,
                weight_version=0,
            )
            for i, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """Free the weights. A second call does nothing."""
        self._model = None

    # -- generation ------------------------------------------------------------------------------

    def _respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        drawn = self._draw(prompts, sampling)
        rollouts = [
            make_rollout(
                self._reader,
                self._read_ids,
                row.token_ids,
                row.logprobs,
                row.finish_reason,
                prompts[row.prompt].given_ids,
            )
            for row in drawn
        ]
        # With labels of several tokens, score rows that the response did not pass are read by one token each.
        for i, row in enumerate(drawn):
            prefixes = forced_prefixes(rollouts[i])
            if prefixes:
                before = prompts[row.prompt].token_ids
                after = self._next_logprobs([(*before, *prefix) for prefix in prefixes])
                rollouts[i] = with_forced(rollouts[i], self._read_ids, after)
        n = sampling.n
        return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _draw(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[_Row]:
        """n rows per prompt: a prompt is computed once, and its cache is copied."""
        self._check_open()
        ids, mask = self._padded([(*prompt.token_ids, *prompt.given_ids) for prompt in prompts])
        rows = [
            _Row(prompt=i, seed=_seed(prompt, sampling, k))
            for i, prompt in enumerate(prompts)
            for k in range(sampling.n)
        ]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, logits, lengths = out.past_key_values, out.logits[:, -1], mask.sum(-1)
        if sampling.n > 1:
            cache.batch_repeat_interleave(sampling.n)
            logits, mask, lengths = (x.repeat_interleave(sampling.n, 0) for x in (logits, mask, lengths))
        active = list(rows)
        while True:
            chosen, logprobs = self._choose(logits, active, sampling)
            for row, token, values in zip(active, chosen.tolist(), logprobs.tolist(), strict=True):
                row.add(token, values, ends=token in self._reader.end_ids, most=sampling.max_new_tokens)
            going = [i for i, row in enumerate(active) if not row.finish_reason]
            if not going:
                return rows
            if len(going) < len(active):
                keep = torch.tensor(going, device=self._device)
                cache.batch_select_indices(keep)
                chosen, mask, lengths = chosen[keep], mask[keep], lengths[keep]
                active = [active[i] for i in going]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], -1)
            out = self._model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=lengths[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            cache, logits, lengths = out.past_key_values, out.logits[:, -1], lengths + 1

    def _choose(self, logits: Tensor, rows: Sequence[_Row], sampling: Sampling) -> tuple[Tensor, Tensor]:
        """([B] the next tokens, [B, 1 + R] their log-probs and those that are read)."""
        logits = logits.float()
        tempered = logits if sampling.temperature == 0 else logits / sampling.temperature
        logprobs = (logits if self.logprobs_mode == "raw_logprobs" else tempered).log_softmax(-1)
        if sampling.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            probabilities = tempered.double().softmax(-1).cpu()
            drawn = [_draw_one(p, row.generator, sampling.top_p) for p, row in zip(probabilities, rows, strict=True)]
            chosen = torch.tensor(drawn, device=self._device)
        return chosen, self._columns(logprobs, chosen)

    def _next_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """[1 + R] log-probs of the token after each sequence; the first is that of the likeliest."""
        ids, mask = self._padded(sequences)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        logprobs = out.logits[:, -1].float().log_softmax(-1)
        found: list[list[float]] = self._columns(logprobs, logprobs.argmax(-1)).tolist()
        return found

    def _columns(self, logprobs: Tensor, chosen: Tensor) -> Tensor:
        read = torch.tensor(self._read_ids, device=logprobs.device)
        return torch.cat([logprobs.gather(1, chosen[:, None]), logprobs[:, read]], 1)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """[B, L] ids with padding on the left, and their mask. What stands in the padding is never seen."""
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=self._device)
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=self._device)
        return ids, mask

    def _check_length(self, prompt: Prompt, room: int) -> None:
        length = len(prompt.token_ids) + len(prompt.given_ids)
        if length + room > self.max_model_len:
            raise JudgeError(
                f"a prompt of {length} tokens with {room} new ones exceeds the {self.max_model_len} of this judge; "
                "lower max_new_tokens or raise max_model_len"
            )

    def _check_open(self) -> None:
        if self._model is None:
            raise JudgeError("this judge is closed; make a new one")


@dataclass(kw_only=True)
class _Row:
    """A response while it is written. logprobs: flat, as `make_rollout` takes them."""

    prompt: int
    seed: int | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.seed)

    def add(self, token: int, values: Sequence[float], *, ends: bool, most: int) -> None:
        self.token_ids.append(token)
        self.logprobs += values
        if ends:
            self.finish_reason = "stop"
        elif len(self.token_ids) == most:
            self.finish_reason = "length"


def _seed(prompt: Prompt, sampling: Sampling, sample: int) -> int | None:
    return None if sampling.seed is None else request_seed(sampling.seed, prompt.row, sample)


def _draw_one(probabilities: Tensor, generator: torch.Generator, top_p: float) -> int:
    """[V] -> a token. top_p: of the likeliest tokens, the fewest that have this mass together."""
    if top_p >= 1:
        mass = probabilities.cumsum(0)  # in any order: to sort a vocabulary costs more than to draw from it
        return _place(mass, float(mass[-1]), generator)
    order = probabilities.argsort(descending=True, stable=True)
    mass = probabilities[order].cumsum(0)
    return int(order[_place(mass, float(mass[int((mass < top_p).sum())]), generator)])


def _place(mass: Tensor, most: float, generator: torch.Generator) -> int:
    """Where a draw from [0, most) falls. mass: [V], cumulative."""
    point = float(torch.rand((), generator=generator, dtype=torch.float64)) * most
    return min(int(torch.searchsorted(mass, torch.tensor(point, dtype=mass.dtype), right=True)), len(mass) - 1)


def _parts(prompts: Sequence[Prompt], n: int, room: int) -> Iterator[list[int]]:
    """Indices of prompts that are generated together, the longest first: memory that suffices then suffices later."""
    lengths = [len(prompt.token_ids) + len(prompt.given_ids) for prompt in prompts]
    part: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -lengths[i]):
        width = lengths[part[0] if part else i] + room
        if part and ((len(part) + 1) * n > MAX_ROWS or (len(part) + 1) * n * width > MAX_TOKENS):
            yield part
            part = []
        part.append(i)
    if part:
        yield part
