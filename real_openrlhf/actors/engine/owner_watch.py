"""Ends a vLLM engine whose owner is gone. Its workers import this module: it must stay light.

vLLM's workers notice when the engine's process ends, but the engine's process does not notice when the program that
started it is killed (`kill -9`, the kernel when memory is short). It would go on and keep its memory for good.
"""

from __future__ import annotations

import os
import threading

import psutil

# Names the process that an engine belongs to; set before the engine starts.
OWNER_ENV = "REAL_OPENRLHF_ENGINE_OWNER"
_EVERY_S = 1.0


def own_engines() -> None:
    """Engines that this process starts from now on end with it."""
    os.environ[OWNER_ENV] = str(os.getpid())


def end_with_owner() -> None:
    """In a worker: once the owner is gone, kill the processes between it and this one, then this one.

    Does nothing without an owner, and for a worker that does not descend from it, such as a Ray actor.
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
