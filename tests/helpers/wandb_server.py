"""As much of a W&B server as a run needs, which can go away: python -m tests.helpers.wandb_server; prints its port.

Every request is a line on stderr: its path and the begin of its body.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_BUCKET = {
    "id": "UnVuOnYxOmFiYw==",
    "description": "",
    "config": "{}",
    "sweepName": None,
    "historyLineCount": 0,
    "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
}
# A word of a GraphQL query -> its answer.
_ANSWERS: dict[str, Any] = {
    "upsertBucket": {"upsertBucket": {}},
    "viewer": {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}},
    "serverInfo": {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        sys.stderr.write(f"{self.path} {body[:400]!r}\n")
        if "graphql" not in self.path:
            self._answer({"exitcode": None, "limits": {}})
            return
        request = json.loads(body)
        answer = next((answer for word, answer in _ANSWERS.items() if word in request["query"]), {})
        if "upsertBucket" in answer:
            name = request["variables"].get("name") or "run"
            answer = {"upsertBucket": {"bucket": {**_BUCKET, "name": name, "displayName": name}, "inserted": True}}
        if "createRunFiles" in request["query"]:
            here = f"http://127.0.0.1:{self.server.server_address[1]}/file"
            files = [{"name": name, "uploadUrl": here} for name in request["variables"]["files"]]
            answer = {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        self._answer({"data": answer})


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
