"""Which flags train_warmup reads, what follows from them, and what train_real says to those of the other command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from real_openrlhf.config.cli import build_parser, config_to_dict, parse_args
from real_openrlhf.config.convert import flags_by_name
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config
from real_openrlhf.config.supervised import is_read
from real_openrlhf.config.validate import validate

NEEDED = ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--ckpt.output_dir", "o"]


def warmup(*flags: str) -> Config:
    return parse_args([*NEEDED, *flags], warmup=True)


@pytest.mark.parametrize(
    "flags", ["", "--eval.dataset x --eval.steps -1", "--eval.dataset x --ckpt.best_metric_key none"]
)
def test_patience_needs_evaluations_that_choose_a_judge(flags: str) -> None:
    assert warmup("--warmup.patience", "2", "--eval.dataset", "x").warmup.patience == 2
    validate(warmup("--warmup.patience", "2", "--eval.dataset", "x"))
    with pytest.raises(ConfigError, match=r"--warmup\.patience counts .* needs --eval\.dataset, --eval\.steps above"):
        validate(warmup("--warmup.patience", "2", *flags.split()))


def test_what_follows_from_the_flags() -> None:
    config = warmup("--train.batch_size", "12")
    assert (config.real.objective, config.real.preset, config.rollout.batch_size) == ("raft", "warmup", 12)
    assert (config.rollout.n_samples_per_prompt, config.rollouts_per_pass, config.samples_per_update) == (1, 12, 12)
    assert config.supervised and not config.uses_engines and config.overridden == ("train.batch_size",)
    assert warmup("--eval.dataset", "x").uses_engines
    assert warmup("--train.micro_batch_size", "4").rollouts_per_pass == 4
    for method, objective in (("sft", "sft"), ("raft", "raft"), ("tract", "raft")):
        assert warmup("--warmup.method", method).real.objective == objective
    assert validate(warmup()) == ["--eval.dataset is not given: there is no evaluation"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--real.beta 0.5", "--real.beta: train_warmup does not read it, it is a flag of train_real"),
        ("--guard.stop mass", "--guard.stop: train_warmup does not read it"),
        ("--algo.kl.init_coef 0.1", "--algo.kl.init_coef: train_warmup does not read it"),
        ("--rollout.n_samples_per_prompt 4", "train_warmup does not read it"),
        ("--eval.engine own --eval.dataset x", "--eval.engine: train_warmup does not read it"),
        ("--rollout.batch_size 3", "use --train.batch_size: every update is a step"),
        ("--real.objective real", "--real.objective real in train_warmup: use --warmup.method"),
        ("--real.preset paper", "--real.preset paper in train_warmup: leave it out"),
        ("--train.batch_size none", "needs the rows per update"),
        ("--train.batch_size 3 --actor.num_gpus_per_node 2", "--train.batch_size 3 must be a multiple of the 2 policy"),
        ("--warmup.method sft --real.lam 2", "--real.lam: the objective sft does not read it"),
        ("--warmup.method dpo", "--warmup.method must be one of sft, raft, tract, got 'dpo'"),
        ("--learning_rate 1", "--learning_rate.*--actor.adam.lr"),
        ("--max_steps 1", "--max_steps.*--train.max_steps"),
    ],
)
def test_flags_that_do_not_belong_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(warmup(*flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--real.objective sft",
            "learns given responses; use python -m real_openrlhf.train_warmup --warmup.method sft",
        ),
        ("--real.preset warmup", "learns given responses; use python -m real_openrlhf.train_warmup"),
        ("--warmup.feedback missing", "--warmup.feedback: train_real does not read it, it is a flag of train_warmup"),
        ("--data.response_key r", "--data.response_key: train_real does not read it"),
    ],
)
def test_train_real_refuses_flags_of_the_warm_up(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(parse_args([*NEEDED, *flags.split()]))


def test_help_shows_what_is_read() -> None:
    texts = {kind: build_parser(warmup=kind).format_help() for kind in (False, True)}
    for name in flags_by_name():
        for kind, text in texts.items():
            shown = re.search(rf"^  --{re.escape(name)}[ ,\n]", text, flags=re.MULTILINE) is not None
            assert shown == is_read(name, kind), name
    assert "default: 1e-05" in texts[True].partition("--actor.adam.lr")[2][:300]


def test_a_recorded_configuration_can_be_run_again(tmp_path: Path) -> None:
    config = warmup("--train.batch_size", "8", "--warmup.method", "sft")
    path = tmp_path / "run_config.json"
    path.write_text(json.dumps(config_to_dict(config)), encoding="utf-8")
    again = parse_args(["--config", str(path)], warmup=True)
    assert again == config
    validate(again)
