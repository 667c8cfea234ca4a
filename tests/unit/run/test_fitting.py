"""What does not fit, why, and the nearest plan that does, for Qwen3-32B on GPUs of 80 GB."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from real_openrlhf.config.convert import build_config
from real_openrlhf.config.schema import Config, LoraConfig
from real_openrlhf.run.fitting import as_flags, nearest_fit, why_not
from real_openrlhf.run.memory import MemoryPlan, Phase, Question, Term, host_bytes, memory_plan
from real_openrlhf.run.model_shape import ModelShape
from tests.helpers.configs import QWEN3_32B, write_config
from tests.unit.config.test_validate import VALID, config_with

B = 10**9
SIXTEEN = {"actor.num_nodes": 2, "actor.num_gpus_per_node": 8, "ds.zero_stage": 3}
TURNS = {"train.colocate_all": True, "vllm.enable_sleep": True, "ds.enable_sleep": True}
WIDE = {"vllm.num_engines": 8, "vllm.tensor_parallel_size": 2}
LONG = {"actor.gradient_checkpointing_enable": True, "train.max_tokens_per_gpu": 18_432}
APART = {"actor.num_gpus_per_node": 8, "ds.zero_stage": 3, "vllm.num_engines": 4, "vllm.tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("big"), "qwen3", **QWEN3_32B)


@pytest.fixture(scope="module")
def asked(folder: str) -> Question:
    shape = ModelShape.of(folder)
    assert shape is not None
    return Question(shape=shape, itemsize=2, card=80 * B, prompt=2048, liger=False)


def planned(asked: Question, *changes: dict[str, Any]) -> tuple[Config, MemoryPlan]:
    config = config_with({name: value for part in changes for name, value in part.items()})
    return config, memory_plan(config, asked)


@pytest.mark.parametrize(
    "changes",
    [
        (SIXTEEN, TURNS, WIDE, LONG),
        (APART, LONG, {"ds.adam_offload": True}),
    ],
)
def test_plans_that_fit(changes: tuple[dict[str, Any], ...], asked: Question) -> None:
    _, plan = planned(asked, *changes)
    assert plan.fits and plan.may_fit


@pytest.mark.parametrize(
    ("changes", "may_fit", "says"),
    [
        (
            (APART, LONG),
            True,
            ["policy of 32.8 billion", "about 104.5 GB on each of 8 GPU(s)", "optimizer 49.1 GB", "have 80.0 GB"],
        ),
        ((APART, LONG, {"actor.num_gpus_per_node": 4}), False, ["at least 147.4 GB on each of 4", "at 'optimizer'"]),
        (
            ({**APART, "ds.zero_stage": 2}, LONG),
            False,
            # 65.5 of weights, 16.4 of gradients pass 80.
            ["at least 131.0 GB", "the table's sum passes that at 'gradients'"],
        ),
        (
            (SIXTEEN, TURNS, WIDE, {"train.max_tokens_per_gpu": 18_432}),
            True,
            ["policy+rollout", "activations 44", "at 'activations'"],
        ),
        (
            (SIXTEEN, TURNS, LONG, {"vllm.num_engines": 16}),
            False,
            [
                "an engine has 65.5 GB of weights",
                "each of its 1 GPU(s)",
                "may take 60.0 GB",
                "utilization 0.75 of 80.0",
            ],
        ),
        (
            (APART, LONG, {"ds.adam_offload": True, "vllm.gpu_memory_utilization": 0.43}),
            True,
            ["beside 1.9 GB of work", "0 tokens of KV cache, and --data.max_len is 3072"],
        ),
    ],
)
def test_plans_that_do_not(changes: Any, may_fit: bool, says: list[str], asked: Question) -> None:
    config, plan = planned(asked, *changes)
    assert not plan.fits and plan.may_fit is may_fit
    text = why_not(plan, config)
    assert [part for part in says if part not in text] == [], text


def test_the_term_that_breaks_it() -> None:
    terms = tuple(Term(name=name, bytes=size, exact=name != "c") for name, size in (("a", 3), ("b", 4), ("c", 2)))
    phase = Phase(name="x", terms=terms)
    assert (phase.total, phase.certain) == (9, 7)
    assert phase.breaking(8).name == "c" and phase.breaking(6).name == "b" and phase.breaking(2).name == "a"
    with pytest.raises(ValueError, match="x fits"):
        phase.breaking(9)


def anywhere(config: Config) -> bool:
    return True


def at_most(gpus: int) -> Any:
    return lambda config: config.ranks + config.vllm.num_engines * config.vllm.tensor_parallel_size <= gpus


@pytest.mark.parametrize(
    ("changes", "allowed", "wanted"),
    [
        (
            (SIXTEEN, TURNS, WIDE, {"train.max_tokens_per_gpu": 18_432}),
            anywhere,
            "--actor.gradient_checkpointing_enable",
        ),
        ((APART, LONG), anywhere, "--ds.adam_offload"),
        (
            (SIXTEEN, TURNS, LONG, {"vllm.num_engines": 16}),
            anywhere,
            "--vllm.tensor_parallel_size 2 --vllm.num_engines 8",
        ),
        (
            (APART, {"train.max_tokens_per_gpu": 18_432}),
            anywhere,
            "--actor.gradient_checkpointing_enable --ds.adam_offload",
        ),
    ],
)
def test_the_nearest_plan_that_fits(changes: Any, allowed: Any, wanted: str, asked: Question, folder: str) -> None:
    config, plan = planned(asked, *changes, {"actor.model_name_or_path": folder})
    assert not plan.fits
    found = nearest_fit(config, asked, allowed)
    assert found is not None and as_flags(found.change) == wanted
    given = {name: value for part in changes for name, value in part.items()}
    changed = build_config({**VALID, **given, **found.change})
    plan = memory_plan(changed, asked)
    assert plan.fits and allowed(changed) and found.host == host_bytes(plan.host)


def test_adapters_are_the_last_resort(asked: Question, folder: str) -> None:
    given = {**APART, **LONG, "actor.num_gpus_per_node": 4, "vllm.num_engines": 2, "actor.model_name_or_path": folder}
    config, plan = planned(asked, given)
    assert not plan.fits

    def not_offloaded(config: Config) -> bool:
        return not config.ds.adam_offload and at_most(8)(config)

    found = nearest_fit(config, asked, not_offloaded)
    assert found is not None and as_flags(found.change) == "--ds.lora.rank 16"
    shape = ModelShape.of(folder, LoraConfig(rank=16))
    assert shape is not None
    adapters = replace(config, ds=replace(config.ds, lora=LoraConfig(rank=16)))
    plan = memory_plan(adapters, replace(asked, shape=shape))
    states = {term.name: term.bytes for term in plan.places[0].phases[0].terms}
    assert plan.fits and states["optimizer"] == 12 * shape.partition(3, 4) < B


def test_where_nothing_fits(asked: Question, folder: str) -> None:
    config, _ = planned(asked, {"ds.zero_stage": 3, "actor.model_name_or_path": folder})
    assert nearest_fit(config, replace(asked, card=12 * B), at_most(2)) is None
