"""Flags as OpenRLHF once called them, and as TRL does, are answered with ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from real_openrlhf.config import other_names as module
from real_openrlhf.config.cli import parse_args, read_config_file
from real_openrlhf.config.convert import flags_by_name
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.other_names import other_name

NAMES = [*module.OURS, *module._TODAY, *module._NOTHING]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pretrain", "here this is --actor.model_name_or_path"),
        ("learning_rate", "here this is --actor.adam.lr"),
        ("actor_learning_rate", "here this is --actor.adam.lr"),
        ("use_wandb", "here this is --logger.wandb.mode online"),
        ("max_steps", "here this is --train.max_steps"),
        ("per_device_train_batch_size", "here this is --train.micro_batch_size"),
        ("num_train_epochs", "here this is --train.num_episodes"),
        ("bf16", "here this is --ds.param_dtype bf16"),
        ("prompt_data", "here this is --data.prompt_dataset"),
        ("n_samples_per_prompt", "here this is --rollout.n_samples_per_prompt"),
        ("num_generations", "here this is --rollout.n_samples_per_prompt"),
        ("advantage_estimator", "no counterpart here: REAL's advantages are leave-one-out"),
        ("zero_stage", "here this is --ds.zero_stage"),
        ("init_kl_coef", "here this is --algo.kl.init_coef"),
        ("critic_pretrain", "REAL has no critic"),
        ("remote_rm_url", "REAL has no reward model"),
        ("fp16", "bf16 or fp32"),
    ],
)
def test_they_are_answered(name: str, says: str, tmp_path: Path) -> None:
    for argv in ([f"--{name}", "1"], [f"--{name}=1"], [f"--{name}"]):
        with pytest.raises(ConfigError, match=rf"^--{name}: .*{re.escape(says)}"):
            parse_args(argv)
    (tmp_path / "run.json").write_text(json.dumps({name: 1}))
    with pytest.raises(ConfigError, match=rf"the unknown key '{name}': .*{re.escape(says)}"):
        read_config_file(tmp_path / "run.json")


def test_all_that_are_wrong_are_answered_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--pretrain", "m", "--zero_stage", "3", "--critic.adam.lr", "1", "--quux"])
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_names_flags_that_exist(name: str) -> None:
    answer = other_name(name)
    assert answer is not None and name not in flags_by_name()
    named = re.findall(r"--(?:no-)?([a-z_]+(?:\.[a-z_]+)+)", answer)
    assert set(named) <= set(flags_by_name()) and (named or name not in module.OURS)


def test_no_name_is_answered_twice() -> None:
    assert len(NAMES) == len(set(NAMES))


def test_the_reason_of_a_dotted_flag_is_given_in_files_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"critic.adam.lr": 1}))
    with pytest.raises(ConfigError, match="REAL has no critic"):
        read_config_file(tmp_path / "run.json")
