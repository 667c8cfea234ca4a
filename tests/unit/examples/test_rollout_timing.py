"""The timing of rollouts: what its variants change, and how seconds become shares."""

from __future__ import annotations

from typing import Any

import pytest

from examples.benchmark.rollout_timing import SHIPPED, make_prompts, parse_args, summary, variants
from real_openrlhf.common.device import CPU_ALLOCATOR_ENV, Device


def test_every_variant_differs_from_the_shipped_engine_in_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CPU_ALLOCATOR_ENV:
        monkeypatch.delenv(name, raising=False)
    plain = Device(name="cpu", dtype_name="fp32")

    def seen(device: Device, caching: bool) -> dict[str, Any]:
        return {**device.engine_env(), **device.engine_options(600), "caching": caching}

    shipped = {**plain.engine_env(), **plain.engine_options(600), "caching": True}
    differs = {}
    for name, (device, caching) in variants().items():
        found = seen(device, caching)
        differs[name] = {key for key in found.keys() | shipped.keys() if found.get(key) != shipped.get(key)}
    assert differs == {
        SHIPPED: set(),
        "blocks of 128 tokens": {"block_size"},
        "blocks of 64 tokens": {"block_size"},
        "memory given back": set(CPU_ALLOCATOR_ENV),
        "no prefix cache": {"caching"},
    }


def test_shares_are_taken_within_a_repeat() -> None:
    found = summary({SHIPPED: [1.0, 2.0, 4.0], "other": [2.0, 2.0, 2.0]})
    assert found[SHIPPED] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert found["other"] == {"median": 1.0, "least": 0.5, "most": 2.0}


def test_prompts_are_reproducible_and_end_anywhere_within_a_block() -> None:
    prompts = make_prompts(4, 512, vocabulary=4000)
    assert [len(prompt.token_ids) for prompt in prompts] == [512, 499, 486, 473]
    again = make_prompts(4, 512, vocabulary=4000)
    assert [prompt.token_ids for prompt in prompts] == [prompt.token_ids for prompt in again]
    assert all(5 <= token < 4000 for prompt in prompts for token in prompt.token_ids)


def test_counts_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--model", "m", "--output", "o", "--samples", "0"])
    assert "--samples must be at least 1" in capsys.readouterr().err
