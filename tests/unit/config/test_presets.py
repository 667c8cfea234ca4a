from __future__ import annotations

from dataclasses import replace

from real_openrlhf.config.batch_plan import batch_plan, resolve_ratio
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.convert import coerce, flags_by_name, get_value
from real_openrlhf.config.presets import PRESETS
from real_openrlhf.config.schema import Config

# The published settings, row by row: (flag, paper, authors' scripts).
TABLE = [
    ("real.lam", 1.0, 1.0),
    ("real.beta", 0.01, 0.0),
    ("real.aggregation", "token_sum", "token_mean"),
    ("real.answer_reward", "logprob", "prob"),
    ("real.standardise", True, True),
    ("real.advantage_clip", 1.0, 1.0),
    ("real.renormalise", False, False),
    ("rollout.n_samples_per_prompt", 16, 16),
    ("rollout.temperature", 1.0, 1.0),
    ("rollout.top_p", 1.0, 0.9),
    ("eval.temperature", 1.0, 1.0),
    ("eval.top_p", 1.0, 0.9),
    ("actor.adam.lr", 1e-6, 1e-6),
    ("actor.adam.weight_decay", 0.1, 0.1),
    ("actor.lr_scheduler", "constant", "constant"),
    ("actor.lr_warmup_ratio", 0.0, 0.0),
    ("actor.max_norm", 1.0, 1.0),
    ("rollout.max_new_tokens", 1024, 1024),
    ("data.max_len", 3072, 3072),
    ("rollout.batch_size", 256, 256),
    ("train.max_epochs", 1, 3),
    ("real.mini_batches", 1, 4),
    ("real.ratio", "auto", "none"),
    ("real.keep_groups", "partial", "partial"),
    ("real.refill", True, False),
    ("eval.steps", 10, 10),
    ("algo.kl.init_coef", 0.0, 0.0),
]


def test_presets_equal_the_published_table() -> None:
    for column, name in enumerate(("paper", "reference"), start=1):
        config = parse_args(["--real.preset", name])
        for row in TABLE:
            assert get_value(config, row[0]) == row[column], (name, row[0])
        assert config.real.preset == name and config.overridden == ()


def test_the_exact_gradient_is_the_papers_with_both_terms_at_their_own_weight() -> None:
    exact, paper = parse_args(["--real.preset", "exact"]), parse_args(["--real.preset", "paper"])
    assert (exact.real.beta, exact.overridden) == (1.0, ())
    assert replace(exact.real, beta=0.01, preset="paper") == paper.real
    assert replace(exact, real=paper.real) == paper


def test_presets_set_the_same_flags_with_values_of_the_right_type() -> None:
    assert PRESETS["paper"].keys() == PRESETS["reference"].keys() == PRESETS["exact"].keys()
    for preset in PRESETS.values():
        for name, value in preset.items():
            assert coerce(flags_by_name()[name], value) == value
            assert type(coerce(flags_by_name()[name], value)) is type(value), name


def test_plain_defaults_are_the_preset_that_is_the_default() -> None:
    assert Config() == parse_args([]) == parse_args(["--real.preset", "exact"])


def test_updates_of_the_presets() -> None:
    paper, reference = parse_args(["--real.preset", "paper"]), parse_args(["--real.preset", "reference"])
    assert batch_plan(paper, 1000).updates_per_step == 1
    assert resolve_ratio(paper) == "on_policy"
    plan = batch_plan(reference, 1000)
    assert (plan.updates_per_epoch, plan.updates_per_step, plan.samples_per_update) == (4, 12, 1024)
    assert resolve_ratio(reference) == "none"
