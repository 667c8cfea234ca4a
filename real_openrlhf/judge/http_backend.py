"""A judge on an OpenAI-compatible server (`vllm serve`): token ids in, log-probs of the labels out.

The request is `/v1/completions` with a prompt of token ids, so that the server tokenizes nothing. Of
vLLM's additions it uses `logprob_token_ids` (exact log-probs of the labels' tokens at every position),
`return_token_ids` and `return_tokens_as_token_ids`. A server that ignores the first returns only the
top log-probs; labels that are not among them are missing: NaN in the rollout.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import torch

from real_openrlhf.actors.engine.spec import check_sampling, forced_prefixes, make_rollout, request_seed, with_forced
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.types import Group, Rollout
from real_openrlhf.common.errors import RunError
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge.types import JudgeError

logger = logging.getLogger(__name__)

# Status codes of faults that may go away: time-outs, too many requests, a server that is starting or being replaced.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# vLLM's default for --max-logprobs.
TOP_LOGPROBS = 20
_TOKEN_ID = "token_id:"


class ServerError(RunError):
    """The server cannot be reached, or its answer cannot be used."""


class ServerBackend:
    """Requests to one server. See `JudgeBackend`; thread-safe.

    url            "http://host:8000", with or without /v1
    reader         has the judge's tokenizer and scale; prompts are tokenized and scores are read here
    model          name on the server; may be left out if it serves one model
    api_key        sent as a bearer token
    logprobs_mode  what the server was started with (--logprobs-mode); "raw_logprobs" is vLLM's default
    concurrency    how many requests run at the same time
    timeout_s      for one request
    retries        how often a request is sent again, at growing intervals

    Raises ServerError when the server does not answer, JudgeError for a model it does not serve.
    """

    def __init__(
        self,
        url: str,
        *,
        reader: ScoreReader,
        model: str | None = None,
        api_key: str | None = None,
        logprobs_mode: str = "raw_logprobs",
        concurrency: int = 64,
        timeout_s: float = 600.0,
        retries: int = 5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise JudgeError(
                f"the server's address must begin with http:// or https://, got {url.rpartition('@')[2]!r}"
            )
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise JudgeError(
                "the server's address holds a user or a password, which messages and lists of processes would show; "
                "leave them out, and give a key by --api_key_env"
            )
        if concurrency < 1 or retries < 0 or not timeout_s > 0:
            raise JudgeError(
                f"concurrency ({concurrency}) must be at least 1, retries ({retries}) at least 0 and the time-out "
                f"({timeout_s}) positive"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.reader = reader
        self.logprobs_mode = logprobs_mode
        self._read_ids = reader.bound.read_token_ids
        self._retries, self._concurrency = retries, concurrency
        self._warned = False
        self._client = httpx.Client(
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=concurrency),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )
        try:
            self.model, self.max_model_len = self._find_model(model)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One request per rollout, so that each has its own seed, as in the engines."""
        check_sampling(sampling, self.logprobs_mode)
        for prompt in prompts:
            self._check_length(prompt, sampling.max_new_tokens + self.reader.bound.extra_tokens)
        jobs = [(prompt, k) for prompt in prompts for k in range(sampling.n)]
        pool = ThreadPoolExecutor(max_workers=self._concurrency, thread_name_prefix="judge-request")
        try:
            rollouts = list(pool.map(lambda job: self._respond(job[0], sampling, job[1]), jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, requests that are not sent yet are cancelled
        return [
            Group(
                prompt_ids=torch.tensor(prompt.token_ids, dtype=torch.int64),
                label=prompt.label,
                rollouts=tuple(rollouts[i * sampling.n : (i + 1) * sampling.n]),
                row=prompt.row,
                weight_version=0,
            )
            for i, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        self._client.close()

    # -- one request ---------------------------------------------------------------------------------

    def _respond(self, prompt: Prompt, sampling: Sampling, sample: int) -> Rollout:
        seed = None if sampling.seed is None else request_seed(sampling.seed, prompt.row, sample)
        ids, logprobs, finish_reason = self._draw((*prompt.token_ids, *prompt.given_ids), sampling, seed)
        rollout = make_rollout(self.reader, self._read_ids, ids, logprobs, finish_reason, prompt.given_ids)
        prefixes = forced_prefixes(rollout)
        if not prefixes:
            return rollout
        # With labels of several tokens, score rows that the response did not pass are read by one token each.
        one = replace(sampling, max_new_tokens=1)
        rows = [self._draw((*prompt.token_ids, *prefix), one, None)[1] for prefix in prefixes]
        return with_forced(rollout, self._read_ids, rows)

    def _draw(self, ids: Sequence[int], sampling: Sampling, seed: int | None) -> tuple[list[int], list[float], str]:
        """Sample tokens after ids. Returns them, their log-probs flat as `make_rollout` takes them, and the reason why
        generation ended: "stop" or "length"."""
        answer = self._post(
            {
                "model": self.model,
                "prompt": list(ids),
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed,
                "stop_token_ids": sorted(self.reader.end_ids),
                "skip_special_tokens": False,
                # All settings are given, since a server takes missing ones from the model's generation config.
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "logprobs": TOP_LOGPROBS,
                "logprob_token_ids": self._read_ids,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
        )
        try:
            choice = answer["choices"][0]
            drawn, found = _token_ids(choice), choice["logprobs"]
            finish_reason = choice["finish_reason"]
            flat: list[float] = []
            for own, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
                flat.append(math.nan if own is None else own)
                flat += [(top or {}).get(f"{_TOKEN_ID}{token}", math.nan) for token in self._read_ids]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.url} answered without token ids or log-probs ({type(error).__name__}: {error}); a judge "
                "needs a server that returns both for /v1/completions, such as `vllm serve`"
            ) from error
        if finish_reason not in ("stop", "length"):
            raise ServerError(f"{self.url} ended a request with {finish_reason!r}")
        if not self._warned and any(value != value for value in flat):
            self._warned = True
            logger.warning(
                "%s does not return the log-probs of every label (logprob_token_ids), only the %d highest: labels "
                "that are not among these count as missing; `vllm serve` 0.29 returns all",
                self.url,
                TOP_LOGPROBS,
            )
        return drawn, flat, finish_reason

    def _check_length(self, prompt: Prompt, new_tokens: int) -> None:
        length = len(prompt.token_ids) + len(prompt.given_ids)
        if self.max_model_len is not None and length + new_tokens > self.max_model_len:
            raise JudgeError(
                f"a prompt of {length} tokens with {new_tokens} new ones exceeds the {self.max_model_len} of the "
                f"server (--max-model-len)"
            )

    # -- HTTP ----------------------------------------------------------------------------------------

    def _find_model(self, name: str | None) -> tuple[str, int | None]:
        answer = self._request("GET", "/v1/models", None)
        try:
            served = {card["id"]: card.get("max_model_len") for card in answer["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.url}/v1/models does not list models; is it an OpenAI-compatible server?"
            ) from error
        if name is None:
            if len(served) != 1:
                raise JudgeError(f"{self.url} serves {len(served)} models, name one: {', '.join(sorted(served))}")
            (name,) = served
        if name not in served:
            raise JudgeError(f"{self.url} does not serve {name!r}; it serves {', '.join(sorted(served)) or 'none'}")
        return name, served[name]

    def _post(self, payload: dict[str, Any]) -> Any:
        return self._request("POST", "/v1/completions", payload)

    def _request(self, method: str, path: str, payload: dict[str, Any] | None) -> Any:
        """The answer's JSON. Raises ServerError with the server's own message."""
        wait, reason = _FIRST_WAIT_S, ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            try:
                response = self._client.request(method, self.url + path, json=payload)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in _RETRIED:
                reason = f"status {response.status_code}: {_message(response)}"
                continue
            if response.status_code >= 400:
                raise ServerError(f"{self.url}{path} refuses with status {response.status_code}: {_message(response)}")
            try:
                return response.json()
            except ValueError as error:
                raise ServerError(f"{self.url}{path}: the answer is not JSON: {response.text[:200]!r}") from error
        raise ServerError(f"{self.url}{path} did not answer in {self._retries + 1} attempts; the last one: {reason}")


def _token_ids(choice: dict[str, Any]) -> list[int]:
    """The sampled ids in either form: a separate list, or "token_id:7" as the log-probs' tokens."""
    if choice.get("token_ids") is not None:
        return [int(token) for token in choice["token_ids"]]
    return [int(token.removeprefix(_TOKEN_ID)) for token in choice["logprobs"]["tokens"]]


def _message(response: httpx.Response) -> str:
    """The message of an error in OpenAI's form, else the beginning of the answer."""
    try:
        body = response.json()
        return str(body.get("error", body).get("message", body))[:500]
    except (ValueError, AttributeError):
        return response.text[:500]
