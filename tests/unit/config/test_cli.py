from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from real_openrlhf.config.cli import build_parser, config_from_dict, config_to_dict, parse_args, resolve
from real_openrlhf.config.convert import flags_by_name, get_value
from real_openrlhf.config.flags import ConfigError, Flag
from real_openrlhf.config.supervised import is_read
from real_openrlhf.config.unsupported import UNSUPPORTED, why_unsupported

# Values that differ from the default where a generic choice would be refused.
SPECIAL = {
    "data.input_template": "Q: {} A:",
    "real.scale": "0-9",
    "real.preset": "reference",
    "actor.adam.betas": (0.5, 0.25),
    "actor.eps_clip_low_high": (0.1, 0.3),
    "real.anchor": ("Score: ", "Final score: "),
    "ds.lora.target_modules": ("q_proj", "v_proj"),
    "eval.steps": -1,
    "real.objective": "real",
    "guard.stop": ("reward", "terms"),
    "guard.max_term_ratio": 3.5,
}


def another_value(item: Flag) -> object:
    if item.name in SPECIAL:
        return SPECIAL[item.name]
    if item.choices:
        return next(choice for choice in item.choices if choice != item.default)
    if item.kind is bool:
        return not item.default
    if item.kind is str:
        return "some text"
    if item.kind is int:
        return (item.default or 5) - 1 if "le" in item.bounds else (item.default or 5) + 2
    return 0.3125


def argv_of(item: Flag, value: object) -> list[str]:
    if item.kind is bool:
        return [f"--{item.name}" if value else f"--no-{item.name}"]
    return [f"--{item.name}", *(str(v) for v in (value if isinstance(value, tuple) else (value,)))]


@pytest.mark.parametrize("item", flags_by_name().values(), ids=lambda item: item.name)
def test_every_flag_round_trips(item: Flag) -> None:
    value = another_value(item)
    config = parse_args(argv_of(item, value))
    assert get_value(config, item.name) == value
    assert value != item.default or item.name == "real.objective"
    assert config_from_dict(config_to_dict(config)) == config
    others = [name for name in flags_by_name() if name != item.name and not item.name.startswith("real.preset")]
    assert all(get_value(config, name) == flags_by_name()[name].default for name in others)


@pytest.mark.parametrize("argv", [["--logger.wandb.key", "s3cret"], ["--logger.wandb.key=s3cret"]])
def test_no_key_is_taken_from_a_command_line_nor_repeated(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"others see what a command line holds .* set WANDB_API_KEY") as caught:
        parse_args(argv)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("argv", "expected"), [([], True), (["true"], True), (["false"], False), (["FALSE"], False)])
def test_booleans_take_a_word_or_none(argv: list[str], expected: bool) -> None:
    assert parse_args(["--data.skip_bad_rows", *argv]).data.skip_bad_rows is expected


def test_booleans_refuse_other_words() -> None:
    with pytest.raises(ConfigError, match=r"--data.skip_bad_rows must be true or false, got 'yes'"):
        parse_args(["--data.skip_bad_rows", "yes"])
    with pytest.raises(ConfigError, match=r"--no-data.skip_bad_rows takes no value"):
        parse_args(["--no-data.skip_bad_rows", "true"])


def test_none_unsets() -> None:
    config = parse_args(
        ["--real.advantage_clip", "none", "--actor.eps_clip_low_high", "none", "--train.max_steps=none"]
    )
    assert config.real.advantage_clip is None
    assert config.actor.eps_clip_low_high is None
    assert config.train.max_steps is None


def test_precedence_defaults_preset_file_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"real": {"beta": 0.5, "preset": "reference"}, "rollout.top_p": 0.8}))
    config = parse_args(["--config", str(file), "--rollout.top_p", "1.0"])
    assert config.real.beta == 0.5  # file over preset
    assert config.rollout.top_p == 1.0  # flag over file
    assert config.real.aggregation == "token_mean"  # preset over default
    assert config.train.seed == 42  # default
    assert set(config.overridden) == {"real.beta", "rollout.top_p"}
    assert parse_args(["--config", str(file), "--real.preset", "paper"]).real.preset == "paper"


def test_a_value_equal_to_the_presets_is_no_override() -> None:
    assert parse_args(["--real.beta", "1", "--train.seed", "3"]).overridden == ()


def test_keep_all_groups_switches_refill_off_unless_asked_for() -> None:
    config = parse_args(["--real.keep_groups", "all"])
    assert config.real.refill is False
    assert set(config.overridden) == {"real.keep_groups", "real.refill"}
    assert parse_args(["--real.keep_groups", "all", "--real.refill"]).real.refill is True


@pytest.mark.parametrize("item", [f for f in flags_by_name().values() if f.path], ids=lambda item: item.name)
def test_paths_may_begin_at_home(item: Flag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yaml")
    home = tmp_path / "mon dossier 数据"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "run.json").write_text(json.dumps({item.name: "~/x y"}))
    (home / "run.yaml").write_text(f"{item.name}: ~/x y\n")
    flag = f"--{item.name}"
    for argv in ([f"{flag}=~/x y"], [flag, "~/x y"], ["--config", "~/run.json"], ["--config=~/run.yaml"]):
        assert get_value(parse_args(argv), item.name) == f"{home}/x y"


def test_which_flags_are_paths() -> None:
    named = "actor.model_name_or_path data.prompt_dataset ckpt.output_dir ckpt.path ckpt.load logger.tensorboard_dir"
    assert {name for name, item in flags_by_name().items() if item.path} == set(named.split())


def test_a_blank_path_is_no_path() -> None:
    with pytest.raises(ConfigError, match=r"--ckpt.path is blank; give a path, or none"):
        parse_args(["--ckpt.path", " "])


def test_yaml(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text('actor:\n  adam:\n    lr: 1e-5\nreal.anchor: ["a ", "b "]\ntrain: {max_steps: null}\n')
    config = parse_args(["--config", str(file)])
    assert config.actor.adam.lr == 1e-5  # YAML reads this as text
    assert config.real.anchor == ("a ", "b ")


def test_a_written_configuration_can_be_read_as_a_file(tmp_path: Path) -> None:
    config = parse_args(["--real.preset", "reference", "--real.beta", "0.25", "--real.scale", "0-9"])
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config_to_dict(config)))
    assert parse_args(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "one mapping"),
        ("a.json", '{"real.bta": 1}', "unknown key 'real.bta'; did you mean real.beta"),
        ("a.json", '{"real.beta": 1, "real.beta": 2}', "'real.beta' twice"),
        ("a.json", '{"rollout": {"top_p": 7}}', "a.json: --rollout.top_p must be"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "", "one mapping"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_args(["--config", str(tmp_path / name)])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.json"):
        parse_args(["--config", str(tmp_path / "nowhere.json")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--real.bta", "1"], "unknown flag --real.bta; did you mean --real.beta"),
        (["--real.bta=-1"], "unknown flag --real.bta; did you mean --real.beta"),
        (["--n_samples_per_prompt", "4"], "here this is --rollout.n_samples_per_prompt"),
        (["--rollout_n_samples", "4"], "did you mean --rollout.n_samples_per_prompt"),
        (["--no-real.refil"], "unknown flag --no-real.refil; did you mean --real.refill"),
        (["--dryrun"], "did you mean --dry_run"),
        (["--quux"], "--help lists all flags"),
        (["--critic.adam.lr", "1"], "--critic.adam.lr is a flag of OpenRLHF that is not used here: REAL has no critic"),
        (["--algo.advantage.estimator", "gae"], "leave-one-out"),
        (["--algo.advantage.is_correction_threshold", "0.5", "5.0"], "unexpected 5.0 after --algo.advantage.is_corr"),
        (["stray"], "unexpected stray"),
        (["--rollout.top", "0.9"], r"unknown flag --rollout.top; did you mean --rollout.top_p\?$"),  # no abbreviations
        (["--rollout.batch_size", "many"], "--rollout.batch_size must be a whole number >= 1, got 'many'"),
        (["--rollout.batch_size", "1e3"], "--rollout.batch_size must be a whole number"),
        (["--rollout.batch_size"], "^--rollout.batch_size has no value; it must be a whole number >= 1$"),
        (
            ["--real.anchor", "--dry_run"],
            "^--real.anchor has no value; it must be one or more values, each text; one that",
        ),
        (["--data.input_template", "-x"], r"has no value; it must be text, or none; .* --data.input_template=-x$"),
        (["--real.device"], "has no value; it must be one of auto, cpu, cuda$"),
        (["--config"], "^--config has no value; it must be the path of a JSON or YAML file$"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(argv)


def test_all_unknown_flags_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--real.bta[\s\S]*--critic.optim"):
        parse_args(["--real.bta", "-1", "--critic.optim", "adam"])


def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--rollout.top_p", "7", "--real.refill=maybe", "--real.bta", "1", "--train.seed", "4"])
    assert str(caught.value).splitlines() == [
        "unknown flag --real.bta; did you mean --real.beta or --real.lam?",
        "--rollout.top_p must be a number > 0 and <= 1, got 7.0",
        "--real.refill must be true or false, got 'maybe'",
    ]
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"rollout": {"top_p": 7, "batch_size": 8}, "real": 3, "lr": 1, "train.seed": "x"}))
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(file)])
    assert str(caught.value).splitlines() == [
        f"--config {file}: --rollout.top_p must be a number > 0 and <= 1, got 7.0",
        f"--config {file}: real is a section, it needs keys below it, got 3",
        f"--config {file} has the unknown key 'lr': here this is --actor.adam.lr",
        f"--config {file}: --train.seed must be a whole number >= 0 and <= 2147483647, got 'x'",
    ]


def test_of_several_files_the_later_ones_count(tmp_path: Path) -> None:
    """None of them is dropped, and flags have precedence wherever they stand."""
    base, more = tmp_path / "base.json", tmp_path / "more.json"
    base.write_text(json.dumps({"actor": {"adam": {"lr": 1e-4}}, "train.seed": 1, "rollout.batch_size": 8}))
    more.write_text(json.dumps({"train": {"seed": 2}, "rollout.batch_size": 16}))
    config = parse_args(["--config", str(base), "--rollout.batch_size", "32", "--config", str(more)])
    assert (config.actor.adam.lr, config.train.seed, config.rollout.batch_size) == (1e-4, 2, 32)
    assert parse_args(["--config", str(more), "--config", str(base)]).train.seed == 1


def openrlhf_flags() -> set[str]:
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("openrlhf is not installed")
    source = Path(next(iter(spec.submodule_search_locations))) / "cli" / "train_ppo_ray.py"
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            first = node.args[0]
            if any(keyword.arg == "dest" for keyword in node.keywords):
                continue  # the negative form of a flag that is there already
            if isinstance(first, ast.Constant):
                names.add(first.value.removeprefix("--"))
            elif isinstance(first, ast.JoinedStr):  # f"--{prefix}.adam.lr" for actor and critic
                tail = "".join(part.value for part in first.values[2:] if isinstance(part, ast.Constant))
                names |= {prefix + tail for prefix in ("actor", "critic")}
    return names


def test_every_flag_of_openrlhf_is_taken_or_explained() -> None:
    theirs = openrlhf_flags()
    assert len(theirs) > 100
    ours = set(flags_by_name())
    assert {name for name in theirs if name not in ours and why_unsupported(name) is None} == set()
    assert {name for name in ours if why_unsupported(name) is not None} == set()
    stale = {key for key in UNSUPPORTED if not any(n == key or (key[-1] == "." and n.startswith(key)) for n in theirs)}
    assert stale == set()


def test_help_names_every_flag() -> None:
    text = build_parser("train").format_help()
    assert all(f"--{name}" in text for name in flags_by_name() if is_read(name, warmup=False))


def test_resolve_without_anything_is_the_default_preset() -> None:
    assert resolve({}).real.preset == "exact"
