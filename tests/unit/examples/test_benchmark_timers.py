"""The benchmark's timers, on scripted clocks."""

from __future__ import annotations

import time

import pytest
import torch

from examples.benchmark.timers import Timers
from real_openrlhf.common.device import Device


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is appended is added to the clock at its next reading."""
    steps: list[float] = []
    now = [100.0]

    def read() -> float:
        now[0] += sum(steps)
        steps.clear()
        return now[0]

    monkeypatch.setattr(time, "perf_counter", read)
    return steps


def test_phases_add_up_and_are_taken_once(clock: list[float]) -> None:
    timers = Timers(Device.resolve("cpu"))
    for seconds in (2.0, 3.0):
        with timers.phase("forward"):
            clock.append(seconds)
        clock.append(7.0)  # between phases
    with timers.phase("backward"):
        clock.append(0.5)
    assert timers.take() == {"forward": 5.0, "backward": 0.5}
    assert timers.take() == {}


def test_a_wrapped_function_is_timed_under_the_name_of_the_moment(clock: list[float]) -> None:
    timers = Timers(Device.resolve("cpu"))

    def work(x: int, *, y: int) -> int:
        clock.append(1.0)
        return x + y

    timed = timers.wrap(lambda: "forward" if torch.is_grad_enabled() else "old_logprobs", work)
    assert timed(1, y=2) == 3
    with torch.no_grad():
        timed(1, y=2)
        timed(1, y=2)
    assert timers.take() == {"forward": 1.0, "old_logprobs": 2.0}


def test_the_end_of_a_phase_is_told_outside_of_its_time(clock: list[float]) -> None:
    timers = Timers(Device.resolve("cpu"))
    ended = []

    def on_end(name: str) -> None:
        ended.append(name)
        clock.append(9.0)

    timers.on_end = on_end
    for name in ("forward", "backward"):
        with timers.phase(name):
            clock.append(1.0)
    assert ended == ["forward", "backward"]
    assert timers.take()["forward"] == 1.0


def test_a_phase_that_fails_is_closed(clock: list[float]) -> None:
    timers = Timers(Device.resolve("cpu"))
    with pytest.raises(RuntimeError), timers.phase("forward"):
        clock.append(4.0)
        raise RuntimeError
    assert timers.take() == {"forward": 4.0}


def test_on_a_gpu_events_are_used_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 250.0 * len(recorded)  # milliseconds
            recorded.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert recorded[-1] == "synchronize"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: recorded.append("synchronize"))
    timers = Timers(Device(name="cuda", dtype_name="bf16"))
    with timers.phase("forward"):
        pass
    assert timers.take() == {"forward": 0.25}
