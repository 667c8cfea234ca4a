from __future__ import annotations

import json

import pytest

from real_openrlhf.config.convert import build_config, coerce, config_from_dict, config_to_dict, flags_by_name, nearest
from real_openrlhf.config.flags import ConfigError


def test_dict_round_trip_through_json() -> None:
    config = build_config(
        {"real.anchor": ("a ", "b "), "actor.eps_clip_low_high": (0.1, 0.3), "data.enable_thinking": False},
        overridden=["real.beta"],
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("former", [None, "<redacted>"])
def test_configurations_of_earlier_versions_can_be_read(former: str | None) -> None:
    assert config_from_dict({"logger": {"wandb": {"key": former, "project": "p"}}}).logger.wandb.project == "p"
    with pytest.raises(ConfigError, match=r"unknown key 'logger.wandb.key'.* set WANDB_API_KEY") as caught:
        config_from_dict({"logger": {"wandb": {"key": "s3cret"}}})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ({"real": {"bta": 1}}, "real.bta.*did you mean real.beta"),
        ({"real": 3}, "real is a section"),
        ({"real": {"beta": 1.0}, "real.beta": 2.0}, "real.beta twice"),
        ({"real": {"beta": True}}, "--real.beta must be a number"),
        ({"real": {"beta": None}}, "--real.beta must be a number"),
        ({"train": {"seed": 1.5}}, "--train.seed must be a whole number"),
        ({"data": {"input_key": 3}}, "--data.input_key .*quotes"),
        ({"actor": {"adam": {"betas": [0.9]}}}, "--actor.adam.betas must be 2 values"),
        ({"data": {"skip_bad_rows": "maybe"}}, "--data.skip_bad_rows must be true or false"),
    ],
)
def test_wrong_keys_and_values(nested: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(nested)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("actor.adam.lr", "1e-6", 1e-6),
        ("actor.adam.lr", 1, 1.0),
        ("train.seed", 7.0, 7),
        ("train.max_steps", "none", None),
        ("real.anchor", "one", ("one",)),
        ("real.keep_groups", "all", "all"),
        ("data.skip_bad_rows", "True", True),
        ("data.enable_thinking", None, None),
        ("real.advantage_clip", "none", None),
    ],
)
def test_coerce(name: str, given: object, expected: object) -> None:
    result = coerce(flags_by_name()[name], given)
    assert result == expected and type(result) is type(expected)


def test_nearest() -> None:
    names = list(flags_by_name())
    assert "rollout.n_samples_per_prompt" in nearest("n_samples_per_prompt", names)
    assert "actor.adam.lr" in nearest("actor.adam.learning", names) or "actor.adam.lr" in nearest("adam.lr", names)
    assert "train.micro_batch_size" in nearest("train_micro_batch_size", names)
    assert nearest("zzzzzz", names) == ""
