"""The recipes of examples/: files parse, plans fit the GPUs that they name, READMEs say what the plans say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from real_openrlhf.common.device import Device
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.config.script_flags import flags_that_count
from real_openrlhf.config.validate import validate
from real_openrlhf.evaluate import parse_args as evaluate_args
from real_openrlhf.run import forecast as forecast_module
from real_openrlhf.run.forecast import Forecast
from real_openrlhf.run.inputs import load_inputs
from real_openrlhf.run.placement import check_fits, nodes_can_be_shared_out
from real_openrlhf.run.plan import RunPlan, make_plan
from real_openrlhf.run.specs import placement_requests
from real_openrlhf.run.tract import stage_1
from tests.helpers.recipes import RECIPES, ROOT, Recipe, data_flags, plan_table
from tests.helpers.run_inputs import inputs_of
from tests.helpers.tiny_judge import write_rows
from tests.unit.run.test_forecast import SLURM

CUDA = Device(name="cuda", dtype_name="bf16")
FOLDERS = sorted({recipe.folder for recipe in RECIPES})
# A warm-up evaluates nothing: it has no engines.
NO_EVALUATION = "--eval.dataset is not given: there is no evaluation"
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


@pytest.fixture(autouse=True)
def no_cluster_and_no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """READMEs have numbers without Liger's layers, which need more memory."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(forecast_module, "_has_liger", lambda config: False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return data_flags(tmp_path_factory.mktemp("data"))


def plan_of(recipe: Recipe, data: list[str], folder: Path, *more: str) -> RunPlan:
    model = ["--actor.model_name_or_path", recipe.model(folder), "--assume_gpus", recipe.gpus]
    return make_plan(inputs_of([*recipe.flags(), *data, *model], *more))


def forecast_of(plan: RunPlan) -> Forecast:
    assert plan.forecast is not None
    return plan.forecast


@every_recipe
def test_the_plan_fits_and_the_readme_says_what_it_says(recipe: Recipe, data: list[str], tmp_path: Path) -> None:
    plan = plan_of(recipe, data, tmp_path)
    found = forecast_of(plan)
    # The count that the model's publisher gives, so the shape is the model's.
    assert found.memory.parameters == recipe.parameters
    assert found.memory.fits and plan.warnings == ()
    # A prompt of the greatest length and all its rollouts are one forward pass.
    assert max(len(prompt.token_ids) for prompt in plan.inputs.train_set.prompts) == 2048
    config = plan.config
    k, response = config.rollout.n_samples_per_prompt, config.rollout.max_new_tokens
    assert 2048 + k * response == config.train.max_tokens_per_gpu
    table = plan_table(found)
    assert table in (recipe.path / "README.md").read_text(encoding="utf-8"), f"{recipe} should say:\n{table}"


def config_of(recipe: Recipe) -> Config:
    named = ["--actor.model_name_or_path", "m", "--data.prompt_dataset", "d", "--eval.dataset", "e"]
    return parse_args([*recipe.flags(), *named])


@every_recipe
def test_the_papers_numbers(recipe: Recipe) -> None:
    config = config_of(recipe)
    real, rollout = config.real, config.rollout
    assert (real.preset, real.lam, real.beta, real.keep_groups) == ("paper", 1.0, 0.01, "partial")
    assert rollout.temperature == config.eval.temperature == 1.0
    rates = {"mistral_7b": 5e-8, "one_24gb_gpu": 1e-5}
    assert config.actor.adam.lr == rates.get(recipe.folder, 1e-6)
    assert config.eval.steps == (10 if recipe.folder == "mistral_7b" else 20) == config.ckpt.save_steps
    if not recipe.folder.startswith("one_"):
        assert (rollout.batch_size, rollout.n_samples_per_prompt, rollout.max_new_tokens) == (256, 16, 1024)
        assert (config.data.max_len, config.eval.max_samples) == (3072, None)


@pytest.mark.parametrize(
    ("name", "flags", "fits"),
    [
        (
            "qwen3_32b/separate",
            "--actor.num_nodes 2 --actor.num_gpus_per_node 6 --vllm.num_engines 1 --no-ds.adam_offload "
            "--rollout.batch_size 252 --train.max_tokens_per_gpu 10240",
            True,
        ),
        ("qwen3_32b/separate", "--no-ds.adam_offload", False),
        ("one_80gb_gpu/config", "--no-ds.adam_offload --ds.lora.rank 32 --actor.adam.lr 1e-5", True),
        ("one_80gb_gpu/config", "--no-ds.adam_offload", False),
        ("qwen3_8b/config", "--vllm.gpu_memory_utilization 0.75", False),
    ],
)
def test_what_the_readmes_say_of_other_flags(
    name: str, flags: str, fits: bool, data: list[str], tmp_path: Path
) -> None:
    recipe = next(recipe for recipe in RECIPES if str(recipe) == name)
    plan = plan_of(recipe, data, tmp_path, *flags.split())
    assert forecast_of(plan).memory.fits is fits and (plan.warnings == ()) is fits


def test_ten_ranks_of_the_32b_policy_leave_no_room_for_three_pairs(data: list[str], tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.config == "separate")
    more = "--actor.num_nodes 2 --actor.num_gpus_per_node 5 --vllm.num_engines 2 --rollout.batch_size 250"
    warnings = plan_of(recipe, data, tmp_path, *more.split()).warnings
    assert any("no such room" in warning and "5 on each of 2 nodes" in warning for warning in warnings)


@every_recipe
def test_its_actors_fit_the_nodes_that_it_names_and_no_fewer(recipe: Recipe) -> None:
    config = config_of(recipe)
    requests = placement_requests(config, CUDA)
    node = {"CPU": 2.0 * recipe.per_node, "GPU": float(recipe.per_node)}
    check_fits(requests, [node] * recipe.nodes)
    assert nodes_can_be_shared_out(requests, [node] * recipe.nodes)
    # No GPU is left over.
    assert sum(len(request.bundles) for request in requests) == recipe.nodes * recipe.per_node


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("by_slurm", [False, True])
def test_the_warm_up_fits_too(folder: str, by_slurm: bool, tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.folder == folder)
    longest = config_of(recipe).data.max_len
    prompt = " ".join(["fine"] * (longest - 20) + ["judge"])
    rows: list[dict[str, object]] = [
        {"prompt": prompt, "label": 1 + i % 5, "response": f"fine score {1 + i % 5}"} for i in range(64)
    ]
    write_rows(tmp_path / "sft.jsonl", rows)
    flags = ["--config", str(recipe.path / "warmup.yaml"), "--data.prompt_dataset", str(tmp_path / "sft.jsonl")]
    flags += ["--actor.model_name_or_path", recipe.model(tmp_path / "model"), "--real.anchor", "score "]
    flags += ["--dry_run", "--assume_gpus", recipe.gpus]
    if by_slurm:
        # warmup.sbatch's pass, where the recipe has none of its own.
        flags = [*flags_that_count(["--train.max_tokens_per_gpu", "18432"], flags, warmup=True), *flags]
    config = parse_args(flags, warmup=True)
    assert config.actor.num_nodes * config.actor.num_gpus_per_node == recipe.nodes * recipe.per_node
    if config.warmup.method == "tract":
        config = stage_1(config)
    plan = make_plan(load_inputs(config))
    assert forecast_of(plan).memory.fits and plan.warnings == (NO_EVALUATION,)


# -- the way from the login node --------------------------------------------------------------------------------------


def bash_blocks() -> list[str]:
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def words_of(block: str) -> list[str]:
    """The words of the last command, with the checkout's path."""
    lines = block.replace("\\\n", " ").strip().splitlines()
    return shlex.split(lines[-1].replace("$here", str(ROOT)).replace("$benchmarks", "e"))


@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_the_job_of_the_index_is_the_recipe(placement: str) -> None:
    (submit,) = (words_of(block) for block in bash_blocks() if "slurm/train_real.sbatch" in block)
    user = submit[submit.index("slurm/train_real.sbatch") + 1 :]
    assert submit[:2] == ["sbatch", "--nodes=2"] and any(word.endswith("colocated.yaml") for word in user)
    user = [word.replace("colocated.yaml", f"{placement}.yaml") for word in user]
    script = [*SLURM, "--no-logger.progress", "--ckpt.load", "auto"]
    job = parse_args([*flags_that_count(script, user), *user])
    recipe = next(recipe for recipe in RECIPES if recipe.config == placement)
    own = config_of(recipe)
    given = {"model_name_or_path": job.actor.model_name_or_path}
    assert replace(job.actor, **given) == replace(own.actor, **given)
    for section in ("vllm", "ds", "train", "rollout", "real", "eval", "algo", "sync", "ref"):
        assert getattr(job, section) == getattr(own, section), section
    assert replace(job.ckpt, output_dir="") == replace(own.ckpt, output_dir="")
    assert replace(job.data, prompt_dataset="d") == replace(own.data, prompt_dataset="d")
    assert validate(job, device="cuda") == []


def test_the_steps_of_the_index_are_the_recipes() -> None:
    text = "\n".join(bash_blocks())
    steps = set(re.findall(r"examples/qwen3_32b/run.sh (\w+)", text))
    assert steps == {"data", "plan"}


def test_the_warm_up_of_the_index_is_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (submit,) = (words_of(block) for block in bash_blocks() if "slurm/warmup.sbatch" in block)
    user = submit[submit.index("slurm/warmup.sbatch") + 1 :]
    script = [*SLURM, "--no-logger.progress", "--ckpt.load", "auto"]
    job = parse_args([*flags_that_count(script, user, warmup=True), *user], warmup=True)
    ((_, _, *words),), code, _ = calls_of("qwen3_32b", tmp_path, "warmup")
    monkeypatch.chdir(ROOT)
    own = parse_args(words, warmup=True)
    assert code == 0 and validate(job, device="cuda") == [NO_EVALUATION]
    assert replace(job.actor, model_name_or_path="") == replace(own.actor, model_name_or_path="")
    assert replace(job.data, prompt_dataset="") == replace(own.data, prompt_dataset="")
    for section in ("vllm", "ds", "rollout", "real", "warmup"):
        assert getattr(job, section) == getattr(own, section), section
    # The job's pass is longer; nothing else differs.
    assert replace(job.train, max_tokens_per_gpu=own.train.max_tokens_per_gpu) == own.train
    assert job.ckpt.output_dir.endswith("runs/qwen3_32b/warmup")


# -- the scripts ------------------------------------------------------------------------------------------------------


def calls_of(folder: str, tmp_path: Path, *words: str, **env: str) -> tuple[list[list[str]], int, str]:
    """The python commands of run.sh with these arguments, its exit code and its complaints; nothing is executed."""
    recorder, notes = tmp_path / "python", tmp_path / "calls"
    code = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[2:]) + chr(10))"
    recorder.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -c "{code}" "{notes}" "$@"\n')
    recorder.chmod(0o755)
    keep = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    paths = {"PYTHON": str(recorder), "DATA": str(tmp_path / "data"), "OUT": str(tmp_path / "out")}
    script = ROOT / "examples" / folder / "run.sh"
    result = subprocess.run(["bash", script, *words], env={**keep, **paths, **env}, capture_output=True, text=True)
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [json.loads(line) for line in lines], result.returncode, result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_steps_are_commands_that_parse(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, code, complaints = calls_of(folder, tmp_path)
    assert (code, complaints) == (0, "")
    modules = [call[1] for call in calls]
    data, train = ["real_openrlhf.data"] * 5, ["real_openrlhf.train_warmup", "real_openrlhf.train_real"]
    assert modules == [*data, *train, *["real_openrlhf.evaluate"] * 3]
    # Configurations are named from the root of the checkout, where run.sh goes.
    monkeypatch.chdir(ROOT)
    warmup, real = parse_args(calls[5][2:], warmup=True), parse_args(calls[6][2:])
    assert (validate(warmup, device="cuda"), validate(real, device="cuda")) == ([NO_EVALUATION], [])
    # REAL begins with what the warm-up exports, in the form in which the warm-up saw its prompts.
    assert real.actor.model_name_or_path == f"{warmup.ckpt.output_dir}/model"
    for section in ("apply_chat_template", "enable_thinking", "max_len"):
        assert getattr(warmup.data, section) == getattr(real.data, section)
    start, judge, both = (evaluate_args(call[2:]) for call in calls[7:])
    assert start.model == real.actor.model_name_or_path and judge.model == f"{real.ckpt.output_dir}/model"
    assert [str(path) for path in both.compare] == [str(start.output_dir), str(judge.output_dir)]
    # The run is evaluated on the same files as its judge.
    assert real.eval.dataset is not None and real.eval.dataset.split(",") == judge.benchmark == start.benchmark


def test_a_start_that_is_given_needs_no_warm_up(tmp_path: Path) -> None:
    calls, code, _ = calls_of("qwen3_8b", tmp_path, START="owner/name")
    assert code == 0 and "real_openrlhf.train_warmup" not in [call[1] for call in calls]
    assert "owner/name" in calls[5]
    # It has no settings of its own, so the evaluation is told how it scores; the trained judge's are in its folder.
    start, judge = (evaluate_args(call[2:]) for call in calls[6:8])
    assert (start.model, start.scale, start.enable_thinking, start.max_new_tokens) == (
        "owner/name",
        "1-5",
        "false",
        1024,
    )
    assert (judge.scale, judge.enable_thinking) == (None, None)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    for name in ("data/flask/manifest.json", "out/warmup/model/real_openrlhf.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    calls, code, _ = calls_of("mistral_7b", tmp_path)
    assert code == 0 and [call[1] for call in calls].count("real_openrlhf.data") == 4
    assert "real_openrlhf.train_warmup" not in [call[1] for call in calls]


def test_a_single_step_with_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, module, *flags),), code, _ = calls_of("qwen3_32b", tmp_path, "plan", "--vllm.num_engines", "2", GPUS="8x80GB")
    monkeypatch.chdir(ROOT)
    config = parse_args(flags)
    assert (code, module, config.dry_run, config.assume_gpus) == (0, "real_openrlhf.train_real", True, "8x80GB")
    assert config.vllm.num_engines == 2 and config.train.colocate_all
    (_, (_, _, *separate)), _, _ = calls_of("qwen3_32b", tmp_path, "plan", PLACEMENT="separate")
    assert not parse_args(separate).train.colocate_all and parse_args(separate).assume_gpus == "2x8xA100-80GB"


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["fly"], {}, "there is no step 'fly'; there are data, plan, warmup, train, evaluate and all"),
        (["all", "--real.beta", "1"], {}, "flags belong to one step"),
        (["plan"], {"PLACEMENT": "mixed"}, "PLACEMENT is colocated or separate, got 'mixed'"),
    ],
)
def test_mistakes_are_told(words: list[str], env: dict[str, str], says: str, tmp_path: Path) -> None:
    calls, code, complaints = calls_of("qwen3_32b", tmp_path, *words, **env)
    assert (calls, code) == ([], 2) and says in complaints


def test_through_a_server_the_trained_judge_alone_is_evaluated(tmp_path: Path) -> None:
    calls, code, _ = calls_of("qwen3_32b", tmp_path, "evaluate", SERVER="http://127.0.0.1:8000")
    (args,) = (evaluate_args(call[2:]) for call in calls)
    assert code == 0 and args.server == "http://127.0.0.1:8000" and args.model.endswith("real/model")


def test_every_readme_says_that_it_was_never_run() -> None:
    for folder in FOLDERS:
        assert "**This recipe was never run**" in (ROOT / "examples" / folder / "README.md").read_text(encoding="utf-8")
