"""Actor classes without their modules: what a lazy class has, and that the driver needs no more."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf.run.lazy_actor import lazy_actor
from tests.helpers.homes import isolate

pytest.importorskip("ray")


class Target:
    def __init__(self, start: int, *, step: int = 1) -> None:
        self.value, self.step = start, step

    def add(self, n: int, *, times: int = 1) -> int:
        self.value += n * self.step * times
        return self.value

    async def later(self, n: int) -> int:
        await asyncio.sleep(0)
        return self.value + n

    def fails(self) -> None:
        raise KeyError("its own")


class WritesAtHome:
    """As DeepSpeed does when it is imported."""

    def __init__(self) -> None:
        self.folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "autotune")
        self.folder.mkdir(parents=True, exist_ok=True)


def test_an_actor_works_without_a_home_that_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("HOME", "/proc/nohome")
    made: Any = lazy_actor(f"{__name__}:WritesAtHome", methods=())()
    assert made.actor.folder.is_relative_to(tmp_path) and made.actor.folder.is_dir()


def test_calls_reach_the_class_behind() -> None:
    lazy: Any = lazy_actor(f"{__name__}:Target", methods=("add", "fails"), coroutines=("later",))
    made = lazy(3, step=2)
    assert lazy.__name__ == "Target" and not isinstance(made, Target)
    assert made.add(5, times=2) == 23 and made.add(1) == 25
    assert asyncio.run(made.later(4)) == 29
    with pytest.raises(KeyError, match="its own"):
        made.fails()
    assert isinstance(made.actor, Target) and made.actor.value == 25


def test_nothing_is_imported_before_it_is_made() -> None:
    lazy = lazy_actor("no.such.module:Class", methods=("run",))
    with pytest.raises(ModuleNotFoundError, match="no"):
        lazy()


def _real_classes() -> dict[str, type]:
    pytest.importorskip("vllm")
    pytest.importorskip("openrlhf")
    from real_openrlhf.actors.engine.rollout_engine import RolloutEngine
    from real_openrlhf.actors.policy.policy_actor import RealPolicyActor
    from real_openrlhf.actors.policy.reference_actor import ReferenceActor
    from real_openrlhf.evals.evaluator import EvaluatorActor

    return {
        "_ENGINE": RolloutEngine,
        "_POLICY": RealPolicyActor,
        "_REFERENCE": ReferenceActor,
        "_EVALUATOR": EvaluatorActor,
    }


def test_lazy_classes_are_like_the_real_ones() -> None:
    """Same name, only methods that exist, coroutines where they are some, and every method that the class adds."""
    from real_openrlhf.run import ray_groups as remote

    for name, real in _real_classes().items():
        lazy = getattr(remote, name)
        assert lazy.__name__ == real.__name__
        has = {key: member for key, member in vars(lazy).items() if not key.startswith("_")}
        for method, member in has.items():
            assert inspect.iscoroutinefunction(member) == inspect.iscoroutinefunction(getattr(real, method)), method
        own = {key for key, member in vars(real).items() if inspect.isfunction(member) and not key.startswith("_")}
        assert own - set(has) == set(), f"{real.__name__} has methods that cannot be called"


def test_ray_sees_an_event_loop_where_there_are_coroutines() -> None:
    from ray._private.async_compat import has_async_methods

    from real_openrlhf.run import ray_groups as remote

    assert has_async_methods(remote._ENGINE)
    assert not any(has_async_methods(cls) for cls in (remote._POLICY, remote._REFERENCE, remote._EVALUATOR))


def test_the_driver_imports_neither_vllm_nor_deepspeed() -> None:
    """All that a driver imports before its actors exist, and what it imports when it starts them."""
    modules = [
        "real_openrlhf.train_real",
        "real_openrlhf.run.start",
        "real_openrlhf.run.specs",
        "real_openrlhf.run.ray_groups",
    ]
    modules += ["real_openrlhf.evals.evaluator", "real_openrlhf.config.openrlhf_args"]
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps([m for m in ('vllm', 'deepspeed', 'openrlhf', 'peft', 'flash_attn') if m in sys.modules]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []
