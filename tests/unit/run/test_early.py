"""Mistakes that the flags alone show are answered before anything that takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "transformers", "ray", "vllm", "deepspeed", "openrlhf", "scipy"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Flags with which nothing is wrong so far."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    (folder / "empty").mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "p", "label": 3}\n')
    return {
        "actor.model_name_or_path": str(folder / "model"),
        "data.prompt_dataset": str(folder / "train.jsonl"),
        "ckpt.output_dir": str(folder / "out"),
    }


# What is changed, and what the message says.
MISTAKES = {
    "a flag is missing": ({"actor.model_name_or_path": ""}, "--actor.model_name_or_path is required"),
    "unknown flag": ({"real.bta": "1"}, "did you mean --real.beta"),
    "wrong value": ({"rollout.top_p": "7"}, "--rollout.top_p must be a number > 0 and <= 1, got 7.0"),
    "no such file of flags": ({"config": "nowhere.yaml"}, "--config: cannot read nowhere.yaml"),
    "contradiction": ({"rollout.n_samples_per_prompt": "1"}, "must be at least 2: advantages compare"),
    "contradiction beside another beta": ({"real.beta": "0.5", "data.max_len": "8"}, "or no prompt fits"),
    "contradiction on a device": ({"real.device": "cpu", "train.colocate_all": "true"}, "needs GPUs"),
    "form of assumed GPUs": ({"assume_gpus": "8 cards", "dry_run": "true"}, "write GPUSxMEMORY"),
    "no such model": ({"actor.model_name_or_path": "/nowhere/m"}, "'/nowhere/m': there is no such folder"),
    "no model": ({"actor.model_name_or_path": "{folder}/empty"}, "empty': the folder is empty"),
    "no such prompts": (
        {"data.prompt_dataset": "{folder}/trian.jsonl"},
        "jsonl: there is no such file or folder (did you",
    ),
    "no splits": ({"data.prompt_dataset": "{folder}/train.jsonl@test"}, "train.jsonl is a file and has no splits"),
}


# The same for what needs more than the flags: what is imported then.
LATER = {
    "a setting that the objective does not read": (
        {"real.objective": "mse_rl", "real.lam": "0.5"},
        "--real.lam: the objective mse_rl does not read it",
        ["torch"],
    ),
    "no such benchmark": (
        {"eval.dataset": "held=/nowhere/test.jsonl"},
        "--eval.dataset /nowhere/test.jsonl: there is no such file",
        ["scipy"],
    ),
    "no such metric": (
        {"eval.dataset": "{folder}/train.jsonl", "ckpt.best_metric_key": "expected/person"},
        "no evaluation metric 'expected/person' (did you mean 'expected/pearson'?)",
        ["scipy"],
    ),
    "another temperature": (
        {"eval.dataset": "{folder}/train.jsonl", "eval.temperature": "0.5"},
        "--eval.temperature 0.5 with --eval.top_p 1 cannot be combined with --rollout.temperature 1",
        ["torch", "scipy"],
    ),
}


def answer(good: dict[str, str], changed: dict[str, str]) -> tuple[str, list[str]]:
    """The message of a command that ends with exit code 2, and what of HEAVY it has imported."""
    folder = str(Path(good["data.prompt_dataset"]).parent)
    flags = {**good, **{name: value.replace("{folder}", folder) for name, value in changed.items()}}
    code = (
        "import json, sys\nfrom real_openrlhf.train_real import main\ncode = main(json.loads(sys.argv[1]))\n"
        f"print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    argv = json.dumps([word for name, value in flags.items() for word in (f"--{name}", value)])
    result = subprocess.run([sys.executable, "-c", code, argv], capture_output=True, text=True)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    exit_code, imported = json.loads(result.stdout)
    assert exit_code == 2 and not Path(good["ckpt.output_dir"]).exists()
    return line, imported


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_before_anything_heavy(case: str, good: dict[str, str]) -> None:
    changed, message = MISTAKES[case]
    line, imported = answer(good, changed)
    assert message in line and imported == []


@pytest.mark.parametrize("case", LATER)
def test_no_more_is_imported_than_the_answer_needs(case: str, good: dict[str, str]) -> None:
    changed, message, needed = LATER[case]
    line, imported = answer(good, changed)
    assert message in line and imported == needed
