"""The evaluator's handle, on actors that answer, die, or have an engine that died."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from real_openrlhf.actors.engine.liveness import EngineDied
from real_openrlhf.run import evaluator_handle as module
from real_openrlhf.run import waiting
from real_openrlhf.run.evaluator_handle import RayEvaluator


class Handle:
    """handle.method.remote(...) gives a reference: what ray.get will do."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: lambda: getattr(self._actor, name)(*args))


class World:
    """deaths: errors of the evaluations in turn; after them, evaluations succeed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *deaths: Exception) -> None:
        self.deaths = list(deaths)
        self.events: list[Any] = []
        self.busy = [2, 1, 0]
        monkeypatch.setattr(module.ray, "get", lambda refs, timeout=None: get(refs))
        monkeypatch.setattr(waiting.ray, "get", lambda refs, timeout=None: get(refs))
        monkeypatch.setattr(module, "_IDLE_S", 0.0)
        self.handle = RayEvaluator(self.start, [Handle(self)], total=9, call_timeout_s=60.0)

    def start(self) -> Handle:
        self.events.append("start")
        return Handle(Evaluator(self))

    # the engine
    def finished_requests(self) -> int:
        return 0

    def in_flight(self) -> int:
        left = self.busy.pop(0)
        self.events.append(f"busy {left}")
        return left


class Evaluator:
    def __init__(self, world: World) -> None:
        self.world, self.state = world, None

    def evaluate(self, version: int) -> str:
        self.world.events.append(f"evaluate {version}, knows {self.state}")
        if self.world.deaths:
            raise self.world.deaths.pop(0)
        self.state = self.state or f"first {version}"
        return f"report {version}"

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["start"]


def get(refs: Any) -> Any:
    return [ref() for ref in refs] if isinstance(refs, list) else refs()


def died() -> RayActorError:
    return ActorUnavailableError("killed", None)


def test_a_dead_evaluator_is_replaced_and_judges_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the engines have answered what the dead one asked, and with the first evaluation that it knew."""
    world = World(monkeypatch)
    world.handle.start(0)
    assert world.handle.result() == "report 0" and world.handle.state_dict() == {"start": "first 0"}
    world.deaths = [died()]
    world.handle.start(5)
    assert world.handle.result() == "report 5"
    assert world.events == [
        "start",
        "evaluate 0, knows None",
        "evaluate 5, knows first 0",
        *("busy 2", "busy 1", "busy 0", "start"),
        "evaluate 5, knows first 0",
    ]
    assert world.handle.state_dict() == {"start": "first 0"}


def test_it_dies_in_the_first_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, died())
    world.handle.start(0)
    assert world.handle.result() == "report 0" and world.handle.state_dict() == {"start": "first 0"}


def test_an_evaluator_that_dies_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, died(), died(), died())
    world.busy = [0] * 9
    world.handle.start(0)
    with pytest.raises(RayActorError):
        world.handle.result()
    assert world.events.count("start") == 3


@pytest.mark.parametrize("cause", [ActorUnavailableError("an engine", None), EngineDied("an engine")])
def test_a_dead_engine_is_not_the_evaluator_s_fault(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    world = World(monkeypatch, RayTaskError("evaluate", "the traceback", cause).as_instanceof_cause())
    world.handle.start(0)
    with pytest.raises(RayTaskError):
        world.handle.result()
    assert world.events.count("start") == 1


def test_a_resumed_evaluator_knows_the_first_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, died())
    world.handle.load_state_dict({"start": "of the checkpoint"})
    world.handle.start(7)
    assert world.handle.result() == "report 7"
    assert [event for event in world.events if "evaluate" in event] == ["evaluate 7, knows of the checkpoint"] * 2
    world.handle.load_state_dict({"start": None})
    assert world.handle.state_dict() == {"start": None}
