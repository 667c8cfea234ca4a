"""A small completion server with a script for a model: vLLM's form of requests and answers, over real HTTP."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Prompt ids -> the ids that are generated and, for every one of them, token -> probability.
Model = Callable[[Sequence[int]], tuple[list[int], dict[int, float]]]


@dataclass
class Behaviour:
    """What a test may spoil. failures: (status, body) for the next completions, in turn."""

    model: Model
    name: str = "judge"
    max_model_len: int = 200
    only_top: int | None = None
    without_ids: bool = False
    failures: list[tuple[int, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, probabilities = self.model(request["prompt"])
        ended = bool(set(ids) & set(request["stop_token_ids"]))
        ids = ids[: request["max_tokens"]]
        wanted = list(probabilities)
        if self.only_top is None:
            wanted = [token for token in request["logprob_token_ids"] if token in probabilities]
        else:
            wanted = sorted(wanted, key=lambda token: -probabilities[token])[: self.only_top]
        top = {f"token_id:{token}": math.log(probabilities[token]) for token in wanted}
        choice = {
            "token_ids": None if self.without_ids else ids,
            "finish_reason": "stop" if ended else "length",
            "logprobs": {
                "tokens": ["?" if self.without_ids else f"token_id:{token}" for token in ids],
                "token_logprobs": [-0.5] * len(ids),
                "top_logprobs": [top] * len(ids),
            },
        }
        return {"choices": [choice]}


@contextmanager
def completion_server(behaviour: Behaviour) -> Iterator[str]:
    """Its address. Answers on a port that was free."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models", self.path
            self._send(200, {"data": [{"id": behaviour.name, "max_model_len": behaviour.max_model_len}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/completions", self.path
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with behaviour.lock:
                behaviour.requests.append(request)
                behaviour.headers.append(dict(self.headers))
                failure = behaviour.failures.pop(0) if behaviour.failures else None
            if failure is not None:
                self._send(failure[0], failure[1])
            else:
                self._send(200, behaviour.answer(request))

        def _send(self, status: int, body: Any) -> None:
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
