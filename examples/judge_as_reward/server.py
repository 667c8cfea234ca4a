"""For run.sh: `server.py port` prints a free port; `server.py wait URL PID` returns once that process answers there."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence

import httpx


def main(words: Sequence[str]) -> int:
    """Exit code 1 if the process ends before it answers."""
    if words[:1] == ["port"]:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            print(sock.getsockname()[1])
        return 0
    _, url, process = words
    while _lives(int(process)):
        try:
            # It listens before its model is loaded, and answers after that.
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return 0
        except httpx.TransportError:
            time.sleep(0.5)
    print(f"{url}: the server has ended", file=sys.stderr)
    return 1


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
