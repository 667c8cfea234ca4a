"""A bounded queue of items before the judge: threads that score, one item each; vLLM batches what they send."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.rewards.requests import Item
from real_openrlhf.judge.types import Score


class QueueFullError(RuntimeError):
    """More items wait than --max_queue allows."""


class Scorer:
    """threads: items that are judged at a time. max_queue: items that may wait or be judged, over all requests.

    weights: of the rubric's dimensions, for items that say nothing of them.
    """

    def __init__(
        self, judge: Judge, *, threads: int, max_queue: int, weights: Mapping[str, float] | None = None
    ) -> None:
        self.judge = judge
        self._max, self._weights = max_queue, weights
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="reward")
        self._lock, self._tokenizer = threading.Lock(), threading.Lock()
        self._n = 0
        _ = judge.backend, judge.max_prompt_tokens  # made here, not by several threads at once

    @property
    def waiting(self) -> int:
        """Items that wait or are being judged."""
        return self._n

    def submit(self, items: Sequence[Item]) -> list[Future[Score]]:
        """Scores to come, in the items' order; cancelling one that has not begun takes it off the queue.

        Raises QueueFullError, and then takes none of them.
        """
        with self._lock:
            if self._n + len(items) > self._max:
                raise QueueFullError(f"{self._n} items wait already and {len(items)} more do not fit (--max_queue)")
            self._n += len(items)
        futures = [self._pool.submit(self._score, item) for item in items]
        for future in futures:
            future.add_done_callback(self._done)
        return futures

    def _score(self, item: Item) -> Score:
        weights = self._weights if item.weights is None else item.weights
        with self._tokenizer:
            prepared = self.judge.prepare(item.parts, weights)
        return self.judge.score_prepared([prepared], weights=weights)[0]

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._n -= 1

    def close(self) -> None:
        """Drop what waits, and let what has begun end."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
