"""Batches collected on demand and one ahead: nothing skipped, nothing doubled, errors where they belong."""

from __future__ import annotations

import threading

import pytest

from real_openrlhf.controller.batches import BatchSource
from real_openrlhf.controller.dynamic_sampling import Collected
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.stream import PromptStream, StreamExhausted


def stream(n: int = 20) -> PromptStream:
    prompts = [Prompt(token_ids=(5, i), label=2.0, row=i, text=str(i)) for i in range(n)]
    return PromptStream(prompts, seed=3, num_episodes=1)


class Source:
    """A BatchSource over a stream; batches of 4 prompts, of which one goes back. Remembers what it was asked for."""

    def __init__(self, prompts: PromptStream) -> None:
        self.prompts = prompts
        self.calls: list[tuple[int, int]] = []
        self.rows: dict[int, list[int]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.batches = BatchSource(prompts, self.collect)

    def collect(self, step: int, version: int) -> Collected:
        assert self.gate.wait(20)
        self.calls.append((step, version))
        taken = self.prompts.take(4)
        self.rows[step] = [p.row for p in taken[:3]]
        self.prompts.put_back(taken[3:])
        return Collected(kept=[], sampled=[], waves=step)


def test_without_a_start_a_batch_is_collected_when_it_is_taken() -> None:
    source = Source(stream())
    batches = [source.batches.take(step, step) for step in (0, 1)]
    assert source.calls == [(0, 0), (1, 1)]
    assert [b.collected.waves for b in batches] == [0, 1] and [b.version for b in batches] == [0, 1]
    assert source.batches.state_dict() == source.prompts.state_dict()


def test_a_batch_ahead_is_collected_in_the_background_and_taken_once() -> None:
    source = Source(stream())
    source.gate.clear()
    source.batches.start(1, 0)
    assert source.calls == []  # this thread goes on
    source.gate.set()
    source.batches.wait()
    assert source.calls == [(1, 0)]
    batch = source.batches.take(1, 1)
    assert (batch.version, batch.collected.waves) == (0, 1) and batch.seconds > 0
    assert source.batches.take(2, 2).version == 2
    assert source.calls == [(1, 0), (2, 2)]


def test_never_two_ahead() -> None:
    source = Source(stream())
    source.batches.start(1, 0)
    with pytest.raises(RuntimeError, match="already collected ahead"):
        source.batches.start(2, 0)


def test_the_state_leaves_a_batch_ahead_out() -> None:
    """What is saved while a batch lies ready draws exactly the same prompts again, in the same order."""
    source = Source(stream())
    source.batches.take(0, 0)
    before = source.prompts.state_dict()
    source.batches.start(1, 0)
    source.batches.wait()
    assert source.prompts.state_dict() != before
    state = source.batches.state_dict()
    assert state == before
    # The run itself goes on with the batch.
    source.batches.take(1, 1)
    assert source.batches.state_dict() == source.prompts.state_dict() != before

    resumed = Source(stream())
    resumed.batches.load_state_dict(state)
    resumed.batches.take(1, 1)
    resumed.batches.take(2, 2)
    source.batches.take(2, 2)
    assert resumed.rows == {step: source.rows[step] for step in (1, 2)}


def test_loading_a_state_throws_a_batch_ahead_away() -> None:
    source = Source(stream())
    state = source.batches.state_dict()
    source.batches.start(1, 0)
    source.batches.load_state_dict(state)
    assert source.batches.take(0, 0).version == 0
    assert source.rows[0] == source.rows[1]  # the prompts that had been taken come again


def test_an_error_ahead_belongs_to_the_step_that_takes_it() -> None:
    source = Source(stream(6))
    source.batches.take(0, 0)
    before = source.prompts.state_dict()
    source.batches.start(1, 0)
    source.batches.wait()
    assert source.batches.state_dict() == before
    with pytest.raises(StreamExhausted):
        source.batches.take(1, 1)
