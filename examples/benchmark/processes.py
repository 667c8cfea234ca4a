"""Starts a contestant's process, asks it for steps, and ends it. Messages are JSON objects, one per line."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from examples.benchmark.protocol import Case, Measured

# With less free memory than this a step is ended, before the kernel kills a process, perhaps another one.
LEAST_FREE_BYTES = 768 * 2**20
POLL_SECONDS = 0.2


class WorkerError(RuntimeError):
    """A contestant did not complete its step; the message says why."""


def free_bytes() -> int:
    return int(psutil.virtual_memory().available)


class Worker:
    """A running contestant. Its stderr goes to `log`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        free: Callable[[], int] = free_bytes,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self._free = log, free
        with log.open("ab") as errors:
            # In a new session, so that processes that the worker starts can be ended with it.
            self._process = subprocess.Popen(
                list(command),
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ready(self, seconds: float) -> dict[str, Any]:
        """Wait for the first line: {"ready": true, "facts": ..., "overrides": ...}."""
        answer = self._answer(seconds)
        if not answer.get("ready"):
            raise WorkerError(f"did not get ready: {answer.get('error', answer)}")
        return answer

    def step(self, case: Case, seed: int, seconds: float) -> Measured:
        """One training step, within `seconds`. Raises WorkerError, after which the worker may be dead."""
        self._say({"op": "step", "case": case.to_json(), "seed": seed})
        answer = self._answer(seconds)
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        try:
            measured = Measured(**{**answer, "case": Case(**answer["case"])})
        except (KeyError, TypeError) as error:
            raise WorkerError(f"answered something else than a step: {error}") from error
        if measured.case != case:
            raise WorkerError(f"was asked for {case} and did {measured.case}")
        if not (measured.total > 0 and abs(measured.loss) < float("inf")):
            raise WorkerError(f"step of {measured.total} s with loss {measured.loss}")
        return measured

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, seconds: float = 10.0) -> None:
        """Ask it to end; end it, and what it started, if it does not."""
        with suppress(WorkerError, subprocess.TimeoutExpired):
            self._say({"op": "quit"})
            self._process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerError(self._ended()) from error

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _answer(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if (free := self._free()) < LEAST_FREE_BYTES:
                    self.kill()
                    raise WorkerError(f"does not fit into memory: ended with {free / 2**30:.1f} GiB left") from None
                if time.monotonic() > deadline:
                    self.kill()
                    raise WorkerError("the time was up: ended") from None
                continue
            if line is None:
                raise WorkerError(self._ended())
            try:
                answer = json.loads(line)
            except json.JSONDecodeError as error:
                self.kill()
                raise WorkerError(f"said something else than JSON: {line.strip()[:200]!r}") from error
            return dict(answer)

    def _ended(self) -> str:
        try:
            code: Any = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = "?"
        tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"its process ended (exit code {code}): {' '.join(tail)[:300]}"
