"""`python -m real_openrlhf.patch`: whose flags are whose, and what is refused before anything starts."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from real_openrlhf import patch
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.dropin.replace import replace
from real_openrlhf.dropin.settings import DropInError, RealSettings
from real_openrlhf.dropin.terms import AGENT_FILE, Terms, check_arguments, check_cpu_arguments
from tests.unit.config.test_cli import openrlhf_flags

MODULE = "openrlhf.cli.train_ppo_ray"
GOOD = {
    "data.label_key": "label",
    "algo.advantage.estimator": "group_norm",
    "reward.clip_range": [-1, 1],
    "algo.kl.init_coef": 0.0,
    "algo.dynamic_filtering_enable": True,
    "train.agent_func_path": AGENT_FILE,
}


def arguments(**given: Any) -> Any:
    """OpenRLHF's defaults with these, by dotted name."""
    from real_openrlhf.config.openrlhf_args import _OPENRLHF_DEFAULTS, _nested

    more = {
        "actor.model_name_or_path": "m",
        "algo.advantage.is_correction_level": "off",
        "algo.kl.init_coef": 0.01,
        "algo.dynamic_filtering_enable": False,
        "data.label_key": None,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "eval.dataset": None,
        "eval.temperature": 0.6,
        "ds.adam_offload": False,
        "ds.enable_sleep": False,
        "vllm.enable_sleep": False,
        "vllm.tensor_parallel_size": 1,
        "train.colocate_all": False,
    }
    return _nested(_OPENRLHF_DEFAULTS | more | given)


def test_flags_are_divided() -> None:
    got = patch.parse(
        [MODULE, "--actor.adam.lr", "-1e-6", "--real.scale", "-5-5", "--x=1", "--real.anchor", "a ", "--real.anchor=b "]
    )
    assert got.terms == {"scale": "-5-5", "anchor": ["a ", "b "]} and not got.on_cpu
    assert got.theirs == ("--actor.adam.lr", "-1e-6", "--x=1", "--train.agent_func_path", AGENT_FILE)
    assert Path(AGENT_FILE).is_file()
    own = patch.parse([MODULE, "--train.agent_func_path=my.py", "--real.renormalise"])
    assert own.theirs == ("--train.agent_func_path=my.py",) and own.terms == {"renormalise": True}
    for words in ([], ["--real.device", "auto"]):
        assert patch.parse([MODULE, "--y", *words]) == patch.Command(theirs=("--y",), terms={}, on_cpu=False)
    assert patch.parse([MODULE, "--y", "--real.device", "cpu"]) == patch.Command(theirs=("--y",), terms={}, on_cpu=True)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["openrlhf.cli.train_sft"], "the module to run, openrlhf.cli.train_ppo_ray; got 'openrlhf.cli.train_sft'"),
        ([MODULE, "--real.scal", "1-5"], r"no flag --real.scal; did you mean --real.scale"),
        ([MODULE, "--real.qqqqq=1"], "no flag --real.qqqqq; there are --real.scale, "),
    ],
)
def test_words_that_cannot_be(words: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=match):
        patch.parse(words)
    assert patch.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_settings_of_the_flags() -> None:
    assert patch._terms({"scale": "0-9", "anchor": ["s "], "beta": 0.5, "ratio": "on_policy", "tis_cap": 2.0}) == Terms(
        settings=RealSettings(scale="0-9", anchors=("s ",)), beta=0.5, ratio="on_policy", tis_cap=2.0
    )
    loss = Terms(settings=RealSettings(), aggregation="token_mean").loss(0.1, 0.3)
    assert (loss.options.clip_low, loss.options.clip_high, loss.options.aggregation) == (0.1, 0.3, "token_mean")
    for given, match in (({"scale": "5"}, "scale"), ({"lam": -1.0}, "lam"), ({"tis_cap": 2.0}, "on_policy")):
        with pytest.raises(ValueError, match=match):
            patch._terms(given)


def test_the_papers_own_flags_pass_without_a_word() -> None:
    assert check_arguments(arguments(**GOOD), Terms(settings=RealSettings())) == []


def test_what_differs_from_the_paper_is_said() -> None:
    differs = {
        "algo.advantage.estimator": "rloo",
        "algo.dynamic_filtering_enable": False,
        "actor.loss_agg_mode": "seq-mean",
    }
    notes = check_arguments(arguments(**GOOD | differs), Terms(settings=RealSettings()))
    assert len(notes) == 3 and "--actor.loss_agg_mode seq-mean plays no part" in notes[0]
    assert "group_norm --reward.clip_range -1 1" in notes[1] and "--algo.dynamic_filtering_enable" in notes[2]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"reward.remote_url": "http://x"}, "leave out --reward.remote_url and --train.agent_func_path"),
        ({"train.agent_func_path": "mine.py"}, "leave out --reward.remote_url and --train.agent_func_path"),
        ({"data.label_key": None}, "--data.label_key"),
        ({"algo.advantage.estimator": "gae"}, "--algo.advantage.estimator gae"),
        ({"algo.kl.init_coef": 0.01}, "add --algo.kl.use_loss, or --algo.kl.init_coef 0"),
        ({"rollout.top_p": 0.9}, "--rollout.top_p 0.9"),
        ({"rollout.temperature": 0.7}, "--rollout.temperature 0.7 needs --algo.advantage.is_correction_level token"),
        ({"eval.dataset": "d"}, "--eval.temperature 0.6"),
        ({"ds.ring_attn_size": 2}, "--ds.ring_attn_size 2"),
        ({"data.max_images_per_prompt": 1}, "--data.max_images_per_prompt 1"),
    ],
)
def test_what_real_cannot_train_with(given: dict[str, Any], match: str) -> None:
    with pytest.raises(DropInError, match=match):
        check_arguments(arguments(**GOOD | given), Terms(settings=RealSettings()))


def test_what_goes_with_what() -> None:
    kl = GOOD | {"algo.kl.init_coef": 0.01, "algo.kl.use_loss": True}
    warm = GOOD | {"rollout.temperature": 0.7, "algo.advantage.is_correction_level": "token", "eval.dataset": "d"}
    for given in (kl, warm | {"eval.temperature": 0.7}, warm | {"eval.temperature": 0}):
        assert check_arguments(arguments(**given), Terms(settings=RealSettings())) == []
    terms = Terms(settings=RealSettings(), ratio="on_policy", tis_cap=2.0)
    with pytest.raises(DropInError, match=r"--real.tis_cap needs the engine's log-probs"):
        check_arguments(arguments(**GOOD), terms)
    assert check_arguments(arguments(**GOOD | {"algo.advantage.is_correction_level": "token"}), terms) == []


def test_errors_of_openrlhfs_own_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise ValueError("theirs")

    monkeypatch.setattr(runpy, "run_module", run)
    before = list(sys.argv)
    with pytest.raises(ValueError, match="theirs"):
        patch.main([MODULE])
    assert sys.argv == before


def test_replace() -> None:
    where = f"{__name__}:"
    owner = sys.modules[__name__]
    owner.THING = SimpleNamespace(inner=1)  # type: ignore[attr-defined]
    assert replace(f"{where}THING.inner", 2) == 1 and owner.THING.inner == 2  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="OTHER"):
        replace(f"{where}OTHER", 1)


@pytest.mark.slow
def test_their_arguments_are_checked_before_anything_starts(tmp_path: Path) -> None:
    """The very command, as far as its arguments: OpenRLHF's parser, then ours."""
    pytest.importorskip("openrlhf")
    words = [
        MODULE,
        "--real.scale",
        "1-5",
        "--real.device",
        "cpu",
        "--data.label_key",
        "label",
        "--actor.model_name_or_path",
        "m",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "real_openrlhf.patch", *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: --algo.advantage.estimator gae: REAL has one advantage" in done.stderr
    assert "on a CPU: DeepspeedStrategy: " in done.stderr


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ds.packing_samples": True}, "--ds.packing_samples"),
        ({"ds.adam_offload": True}, "--ds.adam_offload"),
        ({"train.colocate_all": True}, "--train.colocate_all"),
        ({"algo.advantage.estimator": "gae"}, "critics and reward models are not supported"),
        ({"train.agent_func_path": None}, "critics and reward models are not supported"),
        ({"vllm.tensor_parallel_size": 2}, "--vllm.tensor_parallel_size"),
    ],
)
def test_what_does_not_run_on_a_cpu(given: dict[str, Any], match: str) -> None:
    check_cpu_arguments(arguments(**GOOD))
    with pytest.raises(DropInError, match=match):
        check_cpu_arguments(arguments(**GOOD | given))


def test_the_pages_commands_are_ones(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2]
    pages = [folder / "real_openrlhf/dropin/README.md", folder / "examples/judge_as_reward/run.sh"]
    commands = re.findall(r"-m real_openrlhf\.patch ((?:.*\\\n)*.*)", "\n".join(page.read_text() for page in pages))
    found = [
        patch.parse(shlex.split(text.partition("2>&1")[0].replace("\\\n", " "))) for text in commands if MODULE in text
    ]
    assert [bool(command.terms) for command in found] == [True, False] and [c.on_cpu for c in found] == [False, True]
    for command in found:
        flags = {word.removeprefix("--") for word in command.theirs if word.startswith("--")}
        assert flags <= openrlhf_flags() and len(flags) > 10
