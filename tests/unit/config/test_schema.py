"""Values that are impossible on their own, and what flags know about themselves."""

from __future__ import annotations

import dataclasses

import pytest

from real_openrlhf.config import schema
from real_openrlhf.config.convert import build_config, flags_by_name, get_value
from real_openrlhf.config.flags import ConfigError

IMPOSSIBLE = [
    ("actor.num_nodes", 0),
    ("actor.num_gpus_per_node", 0),
    ("actor.adam.lr", -1e-6),
    ("actor.adam.lr", float("nan")),
    ("actor.adam.lr", float("inf")),
    ("actor.adam.betas", (0.9, 1.0)),
    ("actor.adam.betas", (0.9,)),
    ("actor.adam.betas", [0.9, 0.95]),
    ("actor.adam.eps", 0.0),
    ("actor.lr_scheduler", "cosin"),
    ("actor.eps_clip", 1.0),
    ("actor.eps_clip_low_high", (0.2, 0.0)),
    ("actor.eps_clip_low_high", (1.0, 1.0)),
    ("ds.zero_stage", 4),
    ("ds.param_dtype", "fp16"),
    ("ds.grad_accum_dtype", "fp16"),
    ("ds.lora.dropout", 1.0),
    ("vllm.num_engines", 0),
    ("vllm.gpu_memory_utilization", 1.1),
    ("train.batch_size", 0),
    ("train.max_steps", -1),
    ("train.micro_batch_size", True),
    ("train.seed", -1),
    ("rollout.batch_size", 1.0),
    ("rollout.temperature", 0.0),
    ("rollout.top_p", 0.0),
    ("rollout.top_p", None),
    ("data.input_template", "no place"),
    ("data.input_template", "{} and {}"),
    ("data.skip_bad_rows", 1),
    ("eval.steps", 0),
    ("eval.steps", -2),
    ("algo.kl.estimator", "k4"),
    ("algo.advantage.is_correction_level", "seq"),
    ("algo.advantage.is_correction_threshold", 0.0),
    ("real.preset", "papr"),
    ("real.objective", "ral"),
    ("real.scale", "5-1"),
    ("real.scale", "1,2,x"),
    ("real.anchor", ()),
    ("real.anchor", ("  ",)),
    ("real.advantage_clip", 0.0),
    ("real.keep_groups", "none"),
    ("real.min_mass", 1.5),
    ("real.dead_steps", -1),
    ("sync.check_sequences", 0),
    ("sync.deadline", 0.0),
    ("logger.wandb.mode", "on"),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_its_flag_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^--{name} "):
        build_config({name: value})


def test_greedy_evaluation_takes_one_sample() -> None:
    build_config({"eval.temperature": 0.0})
    with pytest.raises(ConfigError, match=r"--eval\.temperature 0 is greedy"):
        build_config({"eval.temperature": 0.0, "eval.n_samples_per_prompt": 2})


def test_a_flags_name_is_its_path() -> None:
    config = schema.Config()
    for name, item in flags_by_name().items():
        assert get_value(config, name) == item.default, name


def test_every_field_is_a_flag_with_help_and_a_prefix_that_matches_its_place() -> None:
    def walk(cls: type, prefix: str) -> None:
        assert getattr(cls, "prefix", None) == prefix
        for f in dataclasses.fields(cls):
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
            if dataclasses.is_dataclass(default):
                walk(type(default), f"{prefix}.{f.name}" if prefix else f.name)
            elif f.name != "overridden":
                assert f.metadata["help"], f.name

    walk(schema.Config, "")


def test_the_configuration_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.Config().rollout.batch_size = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        schema.Config(schema.ActorConfig())  # type: ignore[call-arg, misc]


def test_derived_sizes() -> None:
    config = build_config({"actor.num_nodes": 2, "actor.num_gpus_per_node": 4, "rollout.batch_size": 8})
    assert (config.ranks, config.samples_per_step, config.samples_per_update) == (8, 128, 128)
    assert build_config({"real.mini_batches": 4}).samples_per_update == 1024
    assert build_config({"real.mini_batches": 4, "train.batch_size": 64}).samples_per_update == 64


def test_clip_bounds() -> None:
    assert build_config({"actor.eps_clip": 0.3}).actor.clip_bounds == (0.3, 0.3)
    assert build_config({"actor.eps_clip_low_high": (0.1, 0.4)}).actor.clip_bounds == (0.1, 0.4)
