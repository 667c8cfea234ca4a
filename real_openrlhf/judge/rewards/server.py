"""`python -m real_openrlhf.judge serve --rewards`: vLLM's server below, the reward's HTTP server above."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

import httpx

from real_openrlhf.actors.engine.owner_watch import own_engines
from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.common.errors import RunError
from real_openrlhf.judge.cli_args import read_key
from real_openrlhf.judge.cli_model import judge_of
from real_openrlhf.judge.rewards.answers import Rewarding
from real_openrlhf.judge.rewards.requests import Reading
from real_openrlhf.judge.rewards.scorer import Scorer
from real_openrlhf.judge.types import JudgeError

logger = logging.getLogger(__name__)

_EVERY_S = 0.5
_SHUTDOWN_S = 30.0
_GRACE_S = 5
_MOST_FILES = 65536
# (host, port) -> vLLM's command and environment
MakeCommand = Callable[[str, int], tuple[list[str], dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Below:
    """The vLLM server that the judge asks. process: None if somebody else runs it."""

    url: str
    key: str | None
    process: subprocess.Popen[bytes] | None

    def lives(self) -> bool:
        return self.process is None or self.process.poll() is None


def serve_rewards(args: argparse.Namespace, make_command: MakeCommand) -> None:
    """Serves until SIGINT or SIGTERM. make_command: of the vLLM server, unless --server names one that runs."""
    try:
        import uvicorn

        from real_openrlhf.judge.rewards.app import OPENRLHF_ROUTE, RewardApp
    except ImportError as error:
        raise JudgeError(f"serve --rewards needs what comes with vLLM, fastapi and the like: {error}") from error
    token = read_key(args.token_env, "--token_env")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    _allow_connections()
    with ExitStack() as stack:
        sock = stack.enter_context(_listen(args.host, args.port))
        below = stack.enter_context(_below(args, make_command))
        options = {"model": args.server_model, "concurrency": args.concurrency, "api_key": below.key}
        judge = stack.enter_context(
            judge_of(
                args,
                server=below.url,
                server_options=options,
                template_suffix=args.template_suffix,
                calibrated=args.calibrated,
            )
        )
        scorer = stack.enter_context(
            Scorer(judge, threads=args.concurrency, max_queue=args.max_queue, weights=args.weights)
        )
        ends = tuple(args.end_text or judge.tokenizer.all_special_tokens)
        served = RewardApp(
            scorer,
            reading=Reading(rubric=args.rubric, labels=args.labels, ends=ends, max_items=args.max_items),
            rewarding=Rewarding(scale=judge.scale, unscored=args.unscored_reward),
            max_bytes=int(args.max_request_mb * 2**20),
            token=token,
            ready=below.lives,
        )
        config = uvicorn.Config(served.app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S)
        server = uvicorn.Server(config)
        threading.Thread(target=_end_with, args=(below, server), name="vllm-watch", daemon=True).start()
        if token is None and not is_loopback(args.host):
            logger.warning(
                "whoever reaches %s:%d can use this judge; --token_env asks for a token", args.host, args.port
            )
        host = f"[{args.host}]" if ":" in args.host else args.host
        where = f"http://{host}:{sock.getsockname()[1]}"
        logger.info("rewards of %s: --reward.remote_url %s%s", args.model, where, OPENRLHF_ROUTE)
        server.run(sockets=[sock])
        if not below.lives():
            assert below.process is not None
            raise RunError(f"the vLLM server ended with code {below.process.returncode}; its log is above")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: a port that is taken is said at once."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise JudgeError(f"--host {host} --port {port}: {error.strerror or error}") from error


def _allow_connections() -> None:
    """A rollout batch comes over as many connections, and the usual limit of open files is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


@contextmanager
def _below(args: argparse.Namespace, make_command: MakeCommand) -> Iterator[Below]:
    if args.server is not None:
        yield Below(url=args.server, key=read_key(args.api_key_env, "--api_key_env"), process=None)
        return
    host, port, key = "127.0.0.1", free_port(), secrets.token_hex(16)
    command, env = make_command(host, port)
    own_engines()  # vLLM's processes end with this one, even if it is killed
    logger.info("starting vLLM's server on port %d; it alone prints what follows until it is ready", port)
    with subprocess.Popen(command, env={**os.environ, **env, "VLLM_API_KEY": key}) as process:
        try:
            below = Below(url=f"http://{host}:{port}", key=key, process=process)
            _wait_until_ready(below)
            yield below
        finally:
            process.terminate()
            try:
                process.wait(_SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(below: Below) -> None:
    """However long it takes: loading a large model takes minutes, and a server that fails ends."""
    never = threading.Event()
    while True:
        if not below.lives():
            assert below.process is not None
            raise RunError(f"the vLLM server could not start, code {below.process.returncode}; its log is above")
        try:
            if httpx.get(f"{below.url}/health", timeout=_EVERY_S * 10, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        never.wait(_EVERY_S)


def _end_with(below: Below, server: object) -> None:
    if below.process is not None:
        below.process.wait()
        server.should_exit = True  # type: ignore[attr-defined]


def _leave(number: int, frame: FrameType | None) -> None:
    """Out of whatever goes on, by way of every `finally`; uvicorn raises the signal again when it has ended."""
    sys.exit(128 + number)
