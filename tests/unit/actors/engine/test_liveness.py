"""Calls that wait for an engine's process, on fakes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from real_openrlhf.actors.engine import liveness
from real_openrlhf.actors.engine.liveness import EngineDied, needs_engine


class Engine:
    def __init__(self) -> None:
        self.llm = SimpleNamespace(errored=False)
        self.cancelled = False

    @needs_engine
    async def answers(self, value: int) -> int:
        await asyncio.sleep(0)
        return value

    @needs_engine
    async def waits(self) -> None:
        """As for a utility call of vLLM whose process has died."""
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    @needs_engine
    async def fails(self) -> None:
        raise KeyError("a mistake")

    @needs_engine
    async def is_cancelled(self) -> None:
        """As for a utility call of vLLM that its process cancels while it ends."""
        raise Exception("Call to pause_scheduler method failed: cancelled")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(liveness, "_EVERY_S", 0.01)
    return Engine()


def test_an_answer_comes_through(engine: Engine) -> None:
    assert asyncio.run(engine.answers(3)) == 3
    engine.llm.errored = True
    assert asyncio.run(engine.answers(4)) == 4  # it was there before the process ended


def test_who_waits_for_a_dead_process_gets_an_error(engine: Engine) -> None:
    async def run() -> None:
        waiting = asyncio.ensure_future(engine.waits())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        engine.llm.errored = True
        with pytest.raises(EngineDied, match="ended during waits"):
            await waiting
        await asyncio.sleep(0)

    asyncio.run(run())
    assert engine.cancelled


def test_an_error_is_the_engine_s_only_if_its_process_ended(engine: Engine) -> None:
    with pytest.raises(KeyError, match="a mistake"):
        asyncio.run(engine.fails())
    engine.llm.errored = True
    with pytest.raises(EngineDied, match=r"ended during fails.*\(KeyError\)"):
        asyncio.run(engine.fails())


def test_an_answer_may_come_before_the_news_of_its_process(engine: Engine) -> None:
    async def run() -> None:
        waiting = asyncio.ensure_future(engine.is_cancelled())
        await asyncio.sleep(0.03)
        engine.llm.errored = True
        with pytest.raises(EngineDied, match="ended during is_cancelled"):
            await waiting

    asyncio.run(run())


def test_a_call_that_fails_in_a_living_process_keeps_its_error(engine: Engine) -> None:
    with pytest.raises(Exception, match="method failed: cancelled") as raised:
        asyncio.run(engine.is_cancelled())
    assert not isinstance(raised.value, EngineDied)
