"""The HTTP side of the reward server: routes, limits, token, metrics."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from real_openrlhf.common.errors import RunError, one_line
from real_openrlhf.data.template import PromptError
from real_openrlhf.judge.cli_score import as_json
from real_openrlhf.judge.rewards.answers import Outcome, Rewarding, reward_of
from real_openrlhf.judge.rewards.requests import Item, Reading, RequestError
from real_openrlhf.judge.rewards.scorer import QueueFullError, Scorer
from real_openrlhf.judge.types import JudgeError, Score

logger = logging.getLogger(__name__)

OPENRLHF_ROUTE, PLAIN_ROUTE = "/get_reward", "/score"
_POLL_S = 1.0  # how often it is looked whether who asked is still there
_CLIENT_GONE = 499
Handler = Callable[[Request], Awaitable[Response]]


class RewardApp:
    """
    token      what a request must bring, as a bearer token or as the password of http://user:TOKEN@host; None: nothing
    max_bytes  longest body of a request
    ready      whether the model behind can answer; else /health says 503
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        reading: Reading,
        rewarding: Rewarding,
        max_bytes: int,
        token: str | None = None,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._scorer, self._reading, self._rewarding = scorer, reading, rewarding
        self._max_bytes, self._token, self._ready = max_bytes, token, ready
        self._metrics = Metrics(scorer)
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self.app.post(OPENRLHF_ROUTE)(self._guarded(OPENRLHF_ROUTE, self._openrlhf))
        self.app.post(PLAIN_ROUTE)(self._guarded(PLAIN_ROUTE, self._plain))
        self.app.get("/health")(self._health)
        self.app.get("/metrics")(self._show_metrics)

    # -- routes --------------------------------------------------------------------------------------

    async def _openrlhf(self, request: Request) -> Response:
        items = self._reading.openrlhf(await self._body(request))
        outcomes = await self._outcomes(items, request)
        return JSONResponse(self._rewarding.openrlhf(outcomes))

    async def _plain(self, request: Request) -> Response:
        wanted, several = self._reading.plain(await self._body(request))
        scored = iter(await self._outcomes([item for item in wanted if isinstance(item, Item)], request))
        outcomes = [next(scored) if isinstance(item, Item) else item for item in wanted]
        if not several:
            if isinstance(outcomes[0], Exception):
                raise outcomes[0]
            return JSONResponse(_as_plain(outcomes[0]))
        return JSONResponse({"results": [_as_plain(outcome) for outcome in outcomes]})

    async def _health(self) -> Response:
        ready = self._ready()
        judge = self._scorer.judge
        content = {
            "status": "ok" if ready else "the model's server has ended",
            "model": judge.model,
            "scale": str(judge.scale),
            "waiting": self._scorer.waiting,
        }
        return JSONResponse(content, status_code=200 if ready else 503)

    async def _show_metrics(self) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # -- around them ---------------------------------------------------------------------------------

    def _guarded(self, route: str, handler: Handler) -> Handler:
        """The handler behind the token, its errors as answers, all of it counted."""

        async def handle(request: Request) -> Response:
            began = time.monotonic()
            try:
                self._check_token(request)
                response = await handler(request)
            except Exception as error:
                response = _error(error)
            self._metrics.seconds.labels(route).observe(time.monotonic() - began)
            self._metrics.requests.labels(route, str(response.status_code)).inc()
            return response

        return handle

    def _check_token(self, request: Request) -> None:
        if self._token is not None and not has_token(request.headers.get("authorization", ""), self._token):
            raise RequestError("this server wants its token, see --token_env", 401)

    async def _body(self, request: Request) -> Any:
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > self._max_bytes:
                raise RequestError(f"the request is longer than {self._max_bytes} bytes (--max_request_mb)", 413)
        try:
            return json.loads(bytes(raw))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request is not JSON: {one_line(error)}", 400) from error

    async def _outcomes(self, items: Sequence[Item], request: Request) -> list[Outcome]:
        """One per item. If who asked goes away, what has not begun is dropped."""
        futures = [asyncio.wrap_future(future) for future in self._scorer.submit(items)]
        waiting = set(futures)
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=_POLL_S)
            if waiting and await request.is_disconnected():
                for future in waiting:
                    future.cancel()
                self._metrics.items.labels("dropped").inc(len(waiting))
                raise RequestError("the client has gone", _CLIENT_GONE)
        outcomes = [_outcome(future) for future in futures]
        for outcome in outcomes:
            self._metrics.note(outcome)
        return outcomes


class Metrics:
    """In Prometheus's form, of this server alone."""

    def __init__(self, scorer: Scorer) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "real_judge_requests", "Requests by HTTP status.", ["route", "status"], registry=self.registry
        )
        self.items = Counter(
            "real_judge_items", "Responses by what became of them.", ["outcome"], registry=self.registry
        )
        self.forced = Counter("real_judge_forced", "Judge responses with a forced anchor.", registry=self.registry)
        self.seconds = Histogram(
            "real_judge_request_seconds", "From request to answer.", ["route"], registry=self.registry
        )
        waiting = Gauge("real_judge_waiting", "Responses that wait or are being judged.", registry=self.registry)
        waiting.set_function(lambda: scorer.waiting)

    def note(self, outcome: Outcome) -> None:
        if isinstance(outcome, Score):
            self.forced.inc(outcome.n_forced)
            self.items.labels("unscored" if reward_of(outcome) is None else "scored").inc()
        else:
            self.items.labels("refused" if isinstance(outcome, (JudgeError, PromptError)) else "failed").inc()


def has_token(header: str, token: str) -> bool:
    """Whether an Authorization header has the token. OpenRLHF sends no header of its own, but turns the user and
    password of an address into one of Basic authentication."""
    kind, _, value = header.partition(" ")
    raw = value.strip().encode("latin-1", "replace")  # as the bytes of a header are decoded
    if kind.lower() == "basic":
        try:
            raw = base64.b64decode(raw, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(raw, token.encode())


def _outcome(future: asyncio.Future[Score]) -> Outcome:
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception):
        raise error
    if not isinstance(error, (JudgeError, PromptError, RunError)):
        logger.error("an item could not be judged", exc_info=error)
    return error


def _as_plain(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Score):
        return {"reward": reward_of(outcome), **as_json(outcome)}
    return {"error": _message(outcome)}


def _message(error: Exception) -> str:
    """What the client may read of it. An error that nobody foresaw stays in the log."""
    known = (RequestError, QueueFullError, JudgeError, PromptError, RunError)
    return one_line(error) if isinstance(error, known) else f"{type(error).__name__}; see the server's log"


def _error(error: Exception) -> Response:
    status, headers = 500, {}
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, QueueFullError):
        status, headers = 503, {"Retry-After": "1"}
    elif isinstance(error, (JudgeError, PromptError)):
        status = 422
    elif isinstance(error, RunError):  # the vLLM server behind
        status = 502
    else:
        logger.error("a request failed", exc_info=error)
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse({"error": _message(error)}, status_code=status, headers=headers)
