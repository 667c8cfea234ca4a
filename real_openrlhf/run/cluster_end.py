"""The processes of a cluster that this process started are gone when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

# Seconds that they have to end by themselves.
_END_S = 10.0


@contextmanager
def nothing_left() -> Iterator[None]:
    """Around ray.shutdown: what hangs or was stopped is killed. Without a cluster of this process: nothing.

    Else it would keep memory that the next start needs. Engines' processes end with their actors.
    """
    family: list[psutil.Process] = []
    for raylet in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if raylet.name() == "raylet":
                family += [raylet, *raylet.children(recursive=True)]
    try:
        yield
    finally:
        _, left = psutil.wait_procs(family, timeout=_END_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_END_S)
