"""What a stock OpenRLHF engine is asked for, and how its answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from real_openrlhf.actors.engine.spec import (
    EngineSpecError,
    check_sampling,
    forced_prefixes,
    make_rollout,
    with_forced,
)
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Rollout
from real_openrlhf.dropin.settings import DropInError


class Listener:
    """Stands before OpenRLHF's engine: asks for the log-probs of `read_ids` at every position, and keeps the answer.

    answer  vLLM's RequestOutput of the last generation
    params  the vLLM SamplingParams that it was asked with
    """

    def __init__(self, engine: Any, read_ids: Sequence[int]) -> None:
        self.engine = engine
        self.read_ids = list(read_ids)
        self.answer: Any = None
        self.params: Any = None

    async def generate(self, prompt_token_ids: Sequence[int], sampling_params: Any, **more: Any) -> Any:
        params = copy(sampling_params)
        # vLLM refuses `logprobs` of another number beside chosen tokens. The sampled token comes in any case.
        params.logprobs, params.logprob_token_ids = None, self.read_ids
        self.params, self.answer = params, await self.engine.generate(prompt_token_ids, params, **more)
        return self.answer


def check_request(params: Any, engine: Any) -> None:
    """DropInError for sampling whose log-probs would be those of another distribution than the one sampled from."""
    if not hasattr(params, "logprob_token_ids"):
        raise DropInError("this vLLM does not return log-probs of chosen tokens (logprob_token_ids); vLLM 0.29 does")
    mode = getattr(engine, "kwargs", {}).get("logprobs_mode") or "raw_logprobs"
    sampling = Sampling(n=1, temperature=params.temperature, top_p=params.top_p, max_new_tokens=params.max_tokens or 1)
    try:
        check_sampling(sampling, mode)
    except EngineSpecError as error:
        raise DropInError(
            f"--rollout.temperature, --rollout.top_p or --eval.temperature: {error}. OpenRLHF's engines return "
            "processed_logprobs with --algo.advantage.is_correction_level token, raw_logprobs with off"
        ) from error
    if mode == "processed_logprobs" and params.top_k > 0:
        raise DropInError(f"top_k {params.top_k}: tokens outside of it would have probability 0; leave it out")


async def read_rollout(reader: ScoreReader, listener: Listener, prompt_ids: Sequence[int]) -> Rollout:
    """The generation that the listener heard, with its score distribution.

    A scale with labels of several tokens takes one request of one token for each of their beginnings that the
    response did not write; see `algo.label_trie`.
    """
    answer = listener.answer.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise DropInError(f"the engine ended a rollout with {answer.finish_reason!r}")
    ids, asked = listener.read_ids, listener.params
    rollout = make_rollout(reader, ids, answer.token_ids, _flat(answer, ids), answer.finish_reason)
    forced = []
    for prefix in forced_prefixes(rollout):
        one = copy(asked)
        one.max_tokens = one.min_tokens = 1
        await listener.generate([*prompt_ids, *prefix], one)
        forced.append(_flat(listener.answer.outputs[0], ids))
    return with_forced(rollout, ids, forced) if forced else rollout


def _flat(answer: Any, read_ids: Sequence[int]) -> list[float]:
    """Per position the sampled token's log-prob, then those of read_ids; as `make_rollout` takes them."""
    if answer.logprobs is None or len(answer.logprobs) != len(answer.token_ids):
        raise DropInError("the engine returned no log-probs with a rollout")
    flat = []
    for token, table in zip(answer.token_ids, answer.logprobs):
        for wanted in (token, *read_ids):
            if wanted not in table:
                raise DropInError(f"the engine did not return the log-prob of token {wanted}")
            flat.append(table[wanted].logprob)
    return flat
