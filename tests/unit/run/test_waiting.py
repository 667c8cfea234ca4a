"""Waiting for actors, on a stand-in for ray.get with a clock of its own."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayTaskError

from real_openrlhf.actors.engine.liveness import EngineDied
from real_openrlhf.actors.sync.agreement import StaleWeights
from real_openrlhf.actors.sync.transfer import SyncError
from real_openrlhf.run import waiting as module
from real_openrlhf.run.waiting import Hung, is_fault, wait_for


class Clock:
    """ray.get that answers at a time; the clock goes on only while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers_at: float) -> None:
        self.now, self.answers_at = 0.0, answers_at
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.ray, "get", self.get)
        monkeypatch.setattr(module.ray, "wait", lambda refs, **_: ([], refs))

    def get(self, refs: Any, timeout: float) -> Any:
        if self.now + timeout < self.answers_at:
            self.now += timeout
            raise GetTimeoutError("not yet")
        self.now = self.answers_at
        return refs


def test_an_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 99.0)
    assert wait_for(["a"], "x", 100.0) == ["a"]
    clock = Clock(monkeypatch, 1e6)
    assert wait_for(["a"], "x", None) == ["a"] and clock.now == 1e6


def test_no_sign_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1e6)
    with pytest.raises(Hung, match=r"train: no sign of 2 of 2 actors for 100 s \(--ray.call_timeout\)"):
        wait_for(["a", "b"], "train", 100.0)
    assert clock.now == 100.0


def test_a_limit_below_the_interval_of_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1e6)
    with pytest.raises(Hung):
        wait_for(["a"], "x", 0.5)
    assert clock.now == 0.5


def test_news_prolong_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come until second 300, then none."""
    clock = Clock(monkeypatch, 1e6)
    with pytest.raises(Hung):
        wait_for(["a"], "rollouts", 100.0, lambda: min(clock.now, 300.0))
    assert clock.now == 400.0


def test_a_word_while_nothing_comes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Clock(monkeypatch, 250.0)
    wait_for(["a"], "rollouts", None)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"rollouts: still waiting for 1 of 1 actors, {s} s without news" for s in (120, 240)]


def test_an_actor_s_own_timeout_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(refs: Any, timeout: float) -> Any:
        raise in_an_actor(GetTimeoutError("its own"))

    monkeypatch.setattr(module.ray, "get", get)
    with pytest.raises(RayTaskError):
        wait_for(["a"], "x", 5.0)


def in_an_actor(error: Exception) -> Exception:
    """As ray.get raises it in the driver."""
    return RayTaskError("f", "the traceback", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ActorDiedError(), True),
        (OutOfMemoryError("the node's"), True),
        (Hung("x"), True),
        (TimeoutError("a sync"), True),
        (in_an_actor(EngineDied("killed")), True),
        (in_an_actor(SyncError("a broadcast")), True),
        (in_an_actor(RuntimeError("Connection closed by peer")), True),
        (in_an_actor(in_an_actor(EngineDied("asked by the evaluator"))), True),
        (in_an_actor(ActorDiedError()), True),
        (in_an_actor(ValueError("a flag")), False),
        (in_an_actor(in_an_actor(ValueError("a flag"))), False),
        (in_an_actor(torch.OutOfMemoryError("CUDA out of memory")), False),
        (in_an_actor(NotImplementedError("x")), False),
        (StaleWeights("differ"), False),
        (RuntimeError("the controller's own"), False),
        (ValueError("the controller's own"), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_may_go_away_by_a_new_start(error: Exception, fault: bool) -> None:
    assert is_fault(error) == fault
    assert ray.exceptions.RayError  # the real ones
