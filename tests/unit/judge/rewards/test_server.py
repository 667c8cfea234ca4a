"""`serve --rewards` as a command: flags, its vLLM server, signals."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from real_openrlhf.common.errors import RunError
from real_openrlhf.judge.cli import main
from real_openrlhf.judge.cli_args import REWARDS, SERVE, parse_args
from real_openrlhf.judge.rewards.server import is_loopback, serve_rewards
from tests.helpers.completion_server import Behaviour, completion_server
from tests.helpers.reward_server import serve_until, signal_handlers
from tests.helpers.tokenizers import word_tokenizer

TOKENIZER = word_tokenizer(["<e", "os>"])
ROW = {TOKENIZER.convert_tokens_to_ids(digit): p for digit, p in zip("123", (0.1, 0.2, 0.6))}
BODY = {"query": ["a good"], "prompts": ["a"], "labels": [""]}

# A server below that answers /health and nothing else, until it is told to end.
BELOW = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": [{"id": "judge", "max_model_len": 200}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/v1/models":
            assert self.headers["Authorization"].startswith("Bearer ")
            sys.exit(7) if "dies" in sys.argv else None
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def says(prompt) -> tuple[list[int], dict[int, float]]:
    return TOKENIZER.encode("text . So the overall score is 3 <eos>", add_special_tokens=False), ROW


@pytest.fixture
def template(tmp_path: Path) -> list[str]:
    path = tmp_path / "short.txt"
    path.write_text("rate : {{ instruction }} answer : {{ response }}\n")
    return ["--template", str(path)]


def ask(client: httpx.Client) -> Any:
    return client.post("/get_reward", json=BODY).json()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_serves_until_it_is_told_to_end(folder: Path, template: list[str], number: int, code: int) -> None:
    with completion_server(Behaviour(model=says)) as below:
        got, answer = serve_until(["--model", str(folder), "--server", below, *template], ask, number=number)
    assert got == code and answer["rewards"] == [pytest.approx(0.1 + 0.4 + 1.8)]


def test_the_server_below_ends_with_this_one(folder: Path, template: list[str], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))\n{BELOW}"

    def make_command(host: str, port: int) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", code, str(port)], {"WORD": "set"}

    got, answer = serve_until(["--model", str(folder), *template], ask, make_command=make_command)
    assert got == 143 and "/v1/completions" in answer["error"]  # it has no model
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_flags() -> None:
    args = parse_args(["serve", "--rewards", "--model", "m", "--", "--swap-space", "1"])
    assert args.command == REWARDS and args.extra == ["--swap-space", "1"]
    assert args.host == "127.0.0.1" and args.token_env is None and args.labels == "reference"
    assert parse_args(["serve", "--model", "m", "--", "--rewards"]).command == SERVE
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--api_key_env", "HOME"], "--api_key_env is of the server that --server names"),
        (["--server_model", "m"], "--server_model is of the server that --server names"),
        (["--max_queue", "0"], "--max_queue must be at least 1"),
        (["--max_items", "0"], "--max_items must be at least 1"),
        (["--max_request_mb", "nan"], "--max_request_mb must be a positive number"),
        (["--unscored_reward", "inf"], "--unscored_reward must be a finite number"),
        (["--token_env", "NOT_SET_ANYWHERE"], "--token_env names NOT_SET_ANYWHERE, which is not set"),
        (["--port", "70000"], "--port must be a port"),
        (["--server", "http://127.0.0.1:1", "--tensor_parallel_size", "2"], "leave them out with --server"),
        (["--server", "http://127.0.0.1:1", "--", "--swap-space", "1"], "leave them out with --server"),
        (["--host", "no.such.host.invalid", "--server", "http://127.0.0.1:1"], "--host no.such.host.invalid"),
        (["--scale", "1-5", "--server", "http://127.0.0.1:1"], "drop --scale"),
    ],
)
def test_flags_that_cannot_work(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], match: str) -> None:
    with signal_handlers():
        assert main(["serve", "--rewards", "--port", "0", "--model", str(folder), *flags]) == 2
    assert match in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with socket.create_server(("127.0.0.1", 0)) as sock, signal_handlers():
        port = sock.getsockname()[1]
        assert main(["serve", "--rewards", "--model", str(folder), "--port", str(port)]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([sys.executable, "-c", "raise SystemExit(3)"], "could not start, code 3"),
        ([sys.executable, "-c", BELOW, "PORT", "dies"], "the vLLM server ended with code 7"),
    ],
)
def test_a_server_below_that_ends_ends_this_one(
    folder: Path, template: list[str], words: list[str], match: str
) -> None:
    args = parse_args(["serve", "--rewards", "--model", str(folder), "--port", "0", *template])
    args.weights = None

    def make_command(host: str, port: int) -> tuple[list[str], dict[str, str]]:
        return [str(port) if word == "PORT" else word for word in words], {}

    before = threading.active_count()
    with signal_handlers(), pytest.raises(RunError, match=match):
        serve_rewards(args, make_command)
    assert threading.active_count() <= before + 1
