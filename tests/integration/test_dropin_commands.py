"""The commands of the pages for OpenRLHF's users, through OpenRLHF's own parser and checks, up to its first actor."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from real_openrlhf import patch
from real_openrlhf.dropin.terms import AGENT_FILE
from real_openrlhf.judge.cli_args import parse_args as judge_args

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
MODULE = "openrlhf.cli.train_ppo_ray"
DROPIN, REWARD = "real_openrlhf/dropin/README.md", "examples/judge_as_reward/README.md"


def commands(page: str, start: str) -> list[list[str]]:
    """The words that follow `start` in the page's bash blocks, one list per command."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line.partition(start)[2]) for line in blocks.splitlines() if line.startswith(start)]


class Reached(Exception):
    """OpenRLHF has accepted its arguments and begins to train."""


@pytest.fixture
def as_a_program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs OpenRLHF's module or ours with these words. -> the arguments that OpenRLHF trains with"""
    import ray
    from openrlhf import utils
    from openrlhf.trainer.ray import ppo_actor, vllm_engine
    from openrlhf.utils import config

    def begin(args: Any) -> None:
        raise Reached(args)

    monkeypatch.setattr(utils, "get_strategy", begin)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for owner, name in ((config, "hierarchize"), (ppo_actor, "PolicyModelActor"), (vllm_engine, "RolloutRayActor")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that what the patch puts there is taken back

    def run(words: list[str], *, patched: bool = False) -> Any:
        with pytest.raises(Reached) as reached:
            if patched:
                patch.main([MODULE, *words])
            else:
                monkeypatch.setattr(sys, "argv", [MODULE, *words])
                runpy.run_module(MODULE, run_name="__main__")
        return reached.value.args[0]

    return run


def test_one_line_before_their_command(as_a_program: Any) -> None:
    ((first, *words),) = commands(DROPIN, "python -m real_openrlhf.patch")
    assert first == MODULE
    args = as_a_program(words, patched=True)
    assert args.real.settings.scale == "1-5" and args.train.agent_func_path == AGENT_FILE
    assert (args.algo.advantage.estimator, args.reward.clip_range) == ("group_norm", [-1.0, 1.0])


def test_a_command_that_real_cannot_train_with_is_refused(
    as_a_program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same test can fail: without the page's estimator, the command does not come that far."""
    ((_, *words),) = commands(DROPIN, "python -m real_openrlhf.patch")
    start = words.index("--algo.advantage.estimator")
    assert patch.main([MODULE, *words[:start], *words[start + 2 :]]) == 2
    assert "--algo.advantage.estimator gae" in capsys.readouterr().err


def test_the_agents_command(as_a_program: Any) -> None:
    (words,) = commands(DROPIN, f"python -m {MODULE}")
    args = as_a_program(words)
    assert args.train.agent_func_path == "judge_agent.py" and args.reward.remote_url == ["agent"]
    assert args.data.label_key == "label" and args.algo.kl.init_coef == 0


def test_the_reward_files_flag(as_a_program: Any) -> None:
    """The agent's command with the text's `--reward.remote_url` in the agent's place."""
    (words,) = commands(DROPIN, f"python -m {MODULE}")
    path = "real_openrlhf/dropin/reward.py"
    assert f"--reward.remote_url {path}" in (ROOT / DROPIN).read_text(encoding="utf-8") and (ROOT / path).is_file()
    start = words.index("--train.agent_func_path")
    args = as_a_program([*words[:start], "--reward.remote_url", path, *words[start + 2 :]])
    assert args.reward.remote_url == [path] and not args.train.agent_func_path


def test_the_judge_as_their_reward(as_a_program: Any) -> None:
    (served,) = commands(REWARD, "python -m real_openrlhf.judge")
    (words,) = commands(REWARD, f"python -m {MODULE}")
    judge, args = judge_args(served), as_a_program(words)
    assert judge.rewards and args.reward.remote_url == [f"http://127.0.0.1:{judge.port}/get_reward"]
    assert judge.labels == "parts" and args.data.label_key == "judging"
