"""Ends a vLLM engine when the process that started it (its owner) is gone. Engine workers import this: keep it light.

vLLM's workers notice when the engine's process ends, but the engine's process does not notice when its owner is killed
(`kill -9`, or the kernel when memory is short). It would keep running and keep its memory for good.
"""

from __future__ import annotations

import os
import threading

import psutil

# Environment variable with the owner's process id; set before the engine starts.
OWNER_ENV = "REAL_OPENRLHF_ENGINE_OWNER"
_EVERY_S = 1.0


def own_engines() -> None:
    """Make this process the owner of the engines that it starts from now on: they end with it."""
    os.environ[OWNER_ENV] = str(os.getpid())


def end_with_owner() -> None:
    """Call in a worker: once the owner is gone, the processes between owner and worker are killed, then the worker.

    Does nothing without an owner, and in a worker that is not the owner's descendant, such as a Ray actor.
    """
    owner = os.environ.get(OWNER_ENV, "")
    between: list[psutil.Process] = []
    for process in psutil.Process().parents():
        if str(process.pid) == owner:
            threading.Thread(target=_watch, args=(process, between), name="engine-owner", daemon=True).start()
            return
        between.append(process)


def _watch(owner: psutil.Process, between: list[psutil.Process]) -> None:
    never = threading.Event()
    while _lives(owner):
        never.wait(_EVERY_S)
    for process in between:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
