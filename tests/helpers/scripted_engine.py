"""OpenRLHF's engine as its agents see it: scripted tokens, log-probs of a fixed distribution after every prefix."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzSG0123456789 .,:!"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; decoding gives the text back as it was."""
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", name_or_path="/no/folder"
    )


def next_logprobs(prefix: Sequence[int], vocabulary: int) -> torch.Tensor:
    """[V] float64: the distribution after a prefix; every prefix has its own."""
    generator = torch.Generator().manual_seed(hash(tuple(prefix)) % 2**31)
    return torch.randn(vocabulary, generator=generator, dtype=torch.float64).log_softmax(0)


class ScriptedEngine:
    """Answers with the scripted responses in turn; a request of one token gets token 0.

    requests: every (token ids, sampling parameters) that came. kwargs: as OpenRLHF's RolloutRayActor has them.
    """

    def __init__(self, tokenizer: Any, responses: Sequence[Sequence[int]], *, finish: str = "stop", **kwargs: Any):
        self.vocabulary = len(tokenizer)
        self.responses = iter(responses)
        self.finish = finish
        self.kwargs = {"model": "/no/folder"} | kwargs
        self.requests: list[tuple[list[int], Any]] = []

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        assert multi_modal_data is None
        self.requests.append((list(prompt_token_ids), copy.deepcopy(sampling_params)))
        ids = [0] if sampling_params.max_tokens == 1 else list(next(self.responses))
        assert len(ids) <= sampling_params.max_tokens
        tables = []
        for i, token in enumerate(ids):
            logprobs = next_logprobs([*prompt_token_ids, *ids[:i]], self.vocabulary)
            wanted = {token, *(sampling_params.logprob_token_ids or [])}
            tables.append({t: SimpleNamespace(logprob=float(logprobs[t])) for t in wanted})
        output = SimpleNamespace(token_ids=ids, logprobs=tables, finish_reason=self.finish, text="")
        return SimpleNamespace(outputs=[output])


def sampling(**changes: Any) -> SimpleNamespace:
    """The parameters that OpenRLHF's SamplesGenerator asks with."""
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 60, "min_tokens": 1, "logprobs": None}
    return SimpleNamespace(**(defaults | {"logprob_token_ids": None} | changes))
