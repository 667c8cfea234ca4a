"""Serves a judge, has it score a CSV of question and answer, and ends the server.

    python -m examples.own_data.ask_server --model runs/own_data/seed_0/real/model --input new.csv --output served.jsonl

These are the two commands of the README, the first with a free port and in the background.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds the server may take to start")
    args = parser.parse_args(argv)
    with served(args.model, args.device, args.deadline) as address:
        words = ["--model", args.model, "--server", address, "--input", args.input, "--output", args.output]
        words += ["--instruction_key", "question", "--response_key", "answer"]
        return subprocess.run([sys.executable, "-m", "real_openrlhf.judge", *words], check=False).returncode


@contextmanager
def served(model: str, device: str, deadline: float) -> Iterator[str]:
    """The address of a server of this model, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", model, "--device", device, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-m", "real_openrlhf.judge", *words]) as server:
        try:
            until = time.monotonic() + deadline
            while not _answers(address):
                if server.poll() is not None:
                    raise SystemExit(
                        f"ask_server: the server ended with code {server.returncode}; its messages are above"
                    )
                if time.monotonic() > until:
                    raise SystemExit(f"ask_server: no answer from {address} in {deadline:g} s; raise --deadline")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
