"""What is left of a batch script's flags beside those of the command and of its --config files."""

from __future__ import annotations

from pathlib import Path

import pytest

from real_openrlhf.common.device import Device
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.config.script_flags import flags_that_count, gpus_of, main
from real_openrlhf.run.specs import placement_requests
from tests.helpers.recipes import RECIPES, Recipe

NEEDED = ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--eval.dataset", "e"]
LAYOUT = "--actor.num_nodes 2 --actor.num_gpus_per_node 8 --vllm.num_engines 8 --vllm.tensor_parallel_size 2"
SHARED = "--train.colocate_all --vllm.enable_sleep --ds.enable_sleep"
OTHER = "--ds.zero_stage 3 --no-logger.progress --ckpt.load auto"
OWN = f"{LAYOUT} {SHARED} {OTHER}".split()


def left(user: str, tmp_path: Path, file: str | None = None) -> str:
    words = user.split()
    if file is not None:
        (tmp_path / "config.yaml").write_text(file)
        words += ["--config", str(tmp_path / "config.yaml")]
    return " ".join(flags_that_count(OWN, words))


def test_what_nobody_gives_is_the_scripts(tmp_path: Path) -> None:
    assert left("--real.beta 1", tmp_path) == " ".join(OWN)
    assert left("", tmp_path, "real: {beta: 1}") == " ".join(OWN)


@pytest.mark.parametrize("given", ["--ds.zero_stage 2", "--ds.zero_stage=2"])
def test_a_flag_of_the_command_replaces_the_scripts_alone(given: str, tmp_path: Path) -> None:
    assert left(given, tmp_path) == f"{LAYOUT} {SHARED} --no-logger.progress --ckpt.load auto"
    # A negated flag is the same flag.
    assert left("--logger.progress", tmp_path) == f"{LAYOUT} {SHARED} --ds.zero_stage 3 --ckpt.load auto"


def test_so_does_one_of_a_file(tmp_path: Path) -> None:
    assert left("", tmp_path, "ds:\n  zero_stage: 2\nlogger.progress: true") == f"{LAYOUT} {SHARED} --ckpt.load auto"
    assert left("", tmp_path, "ds.enable_sleep: false") == f"{LAYOUT} --train.colocate_all --vllm.enable_sleep {OTHER}"


def test_the_command_may_change_a_part_of_the_layout(tmp_path: Path) -> None:
    assert left("--vllm.num_engines 16 --vllm.tensor_parallel_size 1", tmp_path) == (
        f"--actor.num_nodes 2 --actor.num_gpus_per_node 8 {SHARED} {OTHER}"
    )
    # Who shares nothing takes no turns.
    assert left("--no-train.colocate_all", tmp_path) == f"{LAYOUT} {OTHER}"
    assert left("--train.colocate_all", tmp_path) == f"{LAYOUT} --vllm.enable_sleep --ds.enable_sleep {OTHER}"


@pytest.mark.parametrize("file", ["vllm: {num_engines: 3}", "actor.num_gpus_per_node: 8", "train.colocate_all: false"])
def test_a_file_with_a_layout_has_all_of_it(file: str, tmp_path: Path) -> None:
    assert left("--vllm.num_engines 4", tmp_path, file) == OTHER


def of_recipe(recipe: Recipe) -> Config:
    return parse_args([*recipe.flags(), *NEEDED])


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_the_same_run_from_a_batch_script(recipe: Recipe) -> None:
    user = [*recipe.flags(), *NEEDED]
    job = parse_args([*flags_that_count(OWN, user), *user])
    alone = of_recipe(recipe)
    assert job.logger.progress is False
    for section in ("actor", "vllm", "ds", "train", "rollout", "data", "real", "eval", "algo", "sync", "ref", "ckpt"):
        assert getattr(job, section) == getattr(alone, section), section


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_gpus_are_those_that_ray_is_asked_for(recipe: Recipe) -> None:
    for more in ([], ["--algo.kl.init_coef", "0.1", "--ref.num_gpus_per_node", "2"], ["--vllm.num_engines", "5"]):
        config = parse_args([*recipe.flags(), *NEEDED, *more])
        if config.train.colocate_all and "5" in more:
            continue  # contradicts the ranks; `validate` says so
        requests = placement_requests(config, Device(name="cuda", dtype_name="bf16"))
        assert gpus_of(config) == sum(bundle["GPU"] for request in requests for bundle in request.bundles)


def run_main(capsys: pytest.CaptureFixture[str], gpus: int, *user: str) -> tuple[int, list[str], str]:
    code = main(["train_real", str(gpus), *OWN, "--", *NEEDED, *user])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def test_a_word_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    # What comes after the first -- is the user's, whatever it is.
    code, words, said = run_main(capsys, 16, "--ds.zero_stage", "2", "--real.anchor", "The score is ")
    assert (code, said) == (0, "") and " ".join(words) == f"{LAYOUT} {SHARED} --no-logger.progress --ckpt.load auto"


def test_gpus_that_nobody_takes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    path = next(recipe.flags()[1] for recipe in RECIPES if recipe.folder == "qwen3_8b")
    code, words, said = run_main(capsys, 16, "--config", path)
    assert code == 0 and "--train.colocate_all" not in words
    assert said == "warning: the flags take 8 of the job's 16 GPUs\n"


def test_mistakes_end_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, words, said = run_main(capsys, 16, "--rollout.batchsize", "8")
    assert (code, words) == (2, []) and "--rollout.batch_size" in said
    code, words, said = run_main(capsys, 16, "--config", "/no/such.yaml")
    assert (code, words) == (2, []) and "cannot read /no/such.yaml" in said


def test_help_is_left_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(capsys, 16, "--help") == (0, OWN, "")


def test_a_warm_up_has_its_own_flags(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text('{"warmup": {"method": "sft"}, "actor": {"num_gpus_per_node": 8}}')
    words = ["--config", str(tmp_path / "w.json"), "--data.response_key", "r"]
    assert " ".join(flags_that_count(OWN, words, warmup=True)) == OTHER
