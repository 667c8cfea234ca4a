"""Engines that outlive a run: which plans may take the engines of the run before, and what ends when they may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from real_openrlhf.run import kept_engines as module
from real_openrlhf.run.kept_engines import KeptEngines
from real_openrlhf.run.placement import ROLLOUT, Request

PlanOf = Callable[..., Any]


class Engines:
    """In place of RayRolloutGroup."""

    made: ClassVar[list[Engines]] = []

    def __init__(self, spec: Any, **options: Any) -> None:
        self.spec, self.options = spec, options
        self.engines = [f"engine {len(Engines.made)}"]
        self.ended = False
        Engines.made.append(self)

    def shutdown(self) -> None:
        self.ended = True


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What was reserved, released and killed."""
    calls: dict[str, list[Any]] = {"reserved": [], "released": [], "killed": []}
    Engines.made = []

    def reserve(requests: list[Request], timeout_s: float) -> dict[str, list[Any]]:
        calls["reserved"].append([request.name for request in requests])
        return {ROLLOUT: [len(calls["reserved"])]}

    monkeypatch.setattr(module, "reserve", reserve)
    monkeypatch.setattr(module, "release", calls["released"].append)
    monkeypatch.setattr(module, "RayRolloutGroup", Engines)
    monkeypatch.setattr(module.ray, "kill", calls["killed"].append)
    return calls


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    """plan_of(model's config, settings of the spec): a plan, as far as KeptEngines looks."""
    from real_openrlhf.actors.engine.spec import EngineSpec
    from real_openrlhf.common.device import Device
    from tests.helpers.algo_factory import merged_tokenizer, reader_of

    bound = reader_of(merged_tokenizer()).bound
    cpu = Device(name="cpu", dtype_name="fp32")

    def make(
        name: str, network: dict[str, Any], *, n: int = 1, colocate: bool = False, timeout: float = 5.0, **spec: Any
    ) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_name_or_path": name, **network}))
        engine = replace(EngineSpec(model=str(folder), device=cpu, bound=bound, max_model_len=64), **spec)
        config = SimpleNamespace(
            train=SimpleNamespace(colocate_all=colocate),
            vllm=SimpleNamespace(num_engines=n, enable_sleep=False),
            ray=SimpleNamespace(placement_timeout=1.0, call_timeout=timeout),
        )
        request = Request(name=ROLLOUT, bundles=({"CPU": 1.0},) * n)
        other = Request(name="policy", bundles=({"CPU": 1.0},))
        return SimpleNamespace(engine=engine, config=config, placement=(other, request), device=cpu)

    return make


def test_other_weights_and_seeds_use_the_same_engines(world: dict[str, list[Any]], plan_of: PlanOf) -> None:
    kept = KeptEngines()
    first = kept.take(plan_of("a", {"hidden_size": 8}), {"NAME": "value"})
    assert first.call_timeout_s == 5.0
    assert kept.take(plan_of("b", {"hidden_size": 8, "dtype": "float32"}, seed=5, timeout=7.0), {}) is first
    assert first.call_timeout_s == 7.0
    assert world == {"reserved": [[ROLLOUT]], "released": [], "killed": []}
    assert Engines.made[0].options["env"] == {"NAME": "value"} and Engines.made[0].options["group"] == [1]


@pytest.mark.parametrize(
    "other",
    [
        {"network": {"hidden_size": 16}},
        {"network": {"hidden_size": 8}, "max_model_len": 128},
        {"network": {"hidden_size": 8}, "logprobs_mode": "processed_logprobs"},
        {"network": {"hidden_size": 8}, "n": 2},
    ],
)
def test_engines_that_do_not_suit_are_replaced(
    world: dict[str, list[Any]], plan_of: PlanOf, other: dict[str, Any]
) -> None:
    kept = KeptEngines()
    first = kept.take(plan_of("a", {"hidden_size": 8}), {})
    network = other.pop("network")
    second = kept.take(plan_of("b", network, **other), {})
    assert second is not first and Engines.made[0].ended and not Engines.made[1].ended
    assert world["killed"] == ["engine 0"] and world["released"] == [{ROLLOUT: [1]}]
    assert second.options["group"] == [2]  # type: ignore[attr-defined]


def test_all_ends_once(world: dict[str, list[Any]], plan_of: PlanOf) -> None:
    kept = KeptEngines()
    kept.shutdown()
    kept.take(plan_of("a", {}), {})
    kept.shutdown()
    kept.shutdown()
    assert len(world["killed"]) == len(world["released"]) == 1


def test_engines_that_share_their_gpus_are_refused(world: dict[str, list[Any]], plan_of: PlanOf) -> None:
    with pytest.raises(ValueError, match="cannot be kept"):
        KeptEngines().take(plan_of("a", {}, colocate=True), {})
