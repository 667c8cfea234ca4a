"""What a user sees of the command: exit codes, one clear message, and nothing started on bad input."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from real_openrlhf.checkpoint.manifest import CheckpointMeta
from real_openrlhf.common.errors import RunError
from real_openrlhf.common.folder_lock import LOCK_FILE, FolderInUseError, FolderLock
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.schema import Config
from real_openrlhf.controller.checkpointing import make_store
from real_openrlhf.controller.loop import Stopped
from real_openrlhf.controller.output_folder import LIBRARIES_FILE, RunLogError
from real_openrlhf.data.tokenizer import end_token_ids, load_tokenizer
from real_openrlhf.run import main as module
from real_openrlhf.run.identity import run_identity
from real_openrlhf.run.inputs import known_device, load_inputs
from real_openrlhf.run.plan import RunPlan
from real_openrlhf.run.specs import probe_sequences
from real_openrlhf.train_real import main
from tests.helpers.tiny_judge import make_rows, make_tokenizer, write_rows

Flags = dict[str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(model: Path, tmp_path: Path) -> Flags:
    write_rows(tmp_path / "train.jsonl", make_rows(24, seed=0))
    write_rows(tmp_path / "test.jsonl", make_rows(6, seed=1))
    return {
        "actor.model_name_or_path": str(model),
        "data.prompt_dataset": str(tmp_path / "train.jsonl"),
        "eval.dataset": str(tmp_path / "test.jsonl"),
        "ckpt.output_dir": str(tmp_path / "out"),
        "real.anchor": "score ",
        "data.max_len": "32",
        "rollout.max_new_tokens": "8",
        "rollout.batch_size": "8",
        "rollout.n_samples_per_prompt": "4",
    }


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunPlan]:
    """The runs that were started; nothing really is."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runs: list[RunPlan] = []
    monkeypatch.setattr(module, "launch", lambda plan, checkpoint, kept, **more: runs.append(plan))
    return runs


def argv(flags: Flags, *more: str) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", value)] + list(more)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The message of a command that must end with exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_good_input_is_run(flags: Flags, started: list[RunPlan]) -> None:
    assert main(argv(flags)) == 0
    (plan,) = started
    inputs = plan.inputs
    assert len(inputs.train_set) == 24 and [len(b.prompts) for b in inputs.benchmarks] == [6]
    assert inputs.end_ids == {make_tokenizer().eos_token_id}
    assert [inputs.tokenizer.decode([i]) for i in inputs.bound.anchors[0].token_ids] == list("12345")
    assert Path(flags["ckpt.output_dir"]).is_dir()


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    flags: Flags, started: list[RunPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv(flags, "--dry_run")) == 0
    out = capsys.readouterr().out
    assert "Placement" in out and "8 prompts x 4 rollouts = 32 rollouts per step" in out and "-> token" in out
    assert started == [] and not Path(flags["ckpt.output_dir"]).exists()
    del flags["ckpt.output_dir"]
    assert main(argv(flags, "--dry_run")) == 0
    assert "output: none" in capsys.readouterr().out


def test_paths_begin_at_home_and_have_blanks_and_letters_of_any_script(
    flags: Flags,
    model: Path,
    started: list[RunPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "mon dossier 数据"
    shutil.copytree(model, home / "le modèle")
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    monkeypatch.setenv("HOME", str(home))
    write_rows(home / "train set.jsonl", make_rows(24, seed=0))
    write_rows(home / "测试 set.jsonl", make_rows(6, seed=1))
    named = {
        "actor.model_name_or_path": "~/le modèle",
        "data.prompt_dataset": "~/train set.jsonl",
        "eval.dataset": "~/测试 set.jsonl",
        "ckpt.output_dir": "~/runs/x 1",
        "ckpt.path": "~/ckpt é",
    }
    assert main([f"--{name}={value}" for name, value in {**flags, **named}.items()] + ["--dry_run"]) == 0
    assert f"output: {home}/runs/x 1" in capsys.readouterr().out
    assert main([f"--{name}={value}" for name, value in {**flags, **named}.items()]) == 0
    (plan,) = started
    assert plan.model_folder == home / "runs/x 1/model" and Path(plan.config.ckpt.folder) == home / "ckpt é"
    assert [b.name for b in plan.inputs.benchmarks] == ["测试_set"]
    assert plan.config.actor.model_name_or_path == f"{home}/le modèle" and list(Path.cwd().iterdir()) == []


def test_an_unknown_flag(flags: Flags, capsys: pytest.CaptureFixture[str], started: list[RunPlan]) -> None:
    line = refused(capsys, argv(flags, "--rollout.batchsize", "3"))
    assert "unknown flag --rollout.batchsize; did you mean --rollout.batch_size" in line
    assert started == []


@pytest.mark.parametrize("name", ["data.prompt_dataset", "eval.dataset"])
def test_a_missing_file(flags: Flags, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags[name] = str(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in refused(capsys, argv(flags))
    assert not Path(flags["ckpt.output_dir"]).exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "fine judge", "label": 7}, "off the scale"),
        ({"prompt": "fine judge", "label": "good"}, "'good' is not a number"),
        ({"prompt": "fine judge"}, "label"),
        ({"prompt": "", "label": 1}, "the prompt is empty"),
        ({"prompt": "fine " * 25, "label": 1}, "the prompt has 25 tokens, but 24 are left"),
    ],
)
def test_a_bad_row(flags: Flags, row: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(flags["data.prompt_dataset"])
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    line = refused(capsys, argv(flags))
    assert says in line and "train.jsonl, line 25" in line and "--data.skip_bad_rows" in line


def test_bad_rows_can_be_skipped(flags: Flags, started: list[RunPlan]) -> None:
    path = Path(flags["data.prompt_dataset"])
    path.write_text(path.read_text() + '{"prompt": "fine judge", "label": 9}\n')
    assert main(argv(flags, "--data.skip_bad_rows")) == 0
    assert len(started[0].inputs.train_set) == 24 and len(started[0].inputs.train_set.skipped) == 1


def test_labels_of_several_tokens(flags: Flags, started: list[RunPlan]) -> None:
    flags["real.scale"] = "1=1,2=2,3=3,4=4,5=1 2"
    assert main(argv(flags)) == 0
    anchor = started[0].inputs.bound.anchors[0]
    assert [started[0].inputs.tokenizer.decode(list(ids)) for ids in anchor.labels] == ["1", "2", "3", "4", "1 2"]


def test_labels_that_the_tokenizer_does_not_know(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    flags["real.scale"] = "7-9"
    assert "tokens that no other label has" in refused(capsys, argv(flags))
    flags["real.scale"] = "1=fine,2=not fine"
    line = refused(capsys, argv(flags))
    assert "'not fine'" in line and "does not know the label" in line


def test_without_an_output_dir(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    del flags["ckpt.output_dir"]
    assert "--ckpt.output_dir is required" in refused(capsys, argv(flags))


def test_an_output_dir_that_is_a_file(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert "--ckpt.output_dir" in (line := refused(capsys, argv(flags))) and "is a file" in line
    assert started == [] and (tmp_path / "out").read_text() == "mine"


def test_an_output_dir_that_holds_something(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "is not empty (thesis.tex)" in refused(capsys, argv(flags))
    assert started == []


def test_a_model_without_a_tokenizer(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    flags["actor.model_name_or_path"] = str(tmp_path / "empty")
    assert main(argv(flags)) == 2
    assert (
        "error: --actor.model_name_or_path" in (err := capsys.readouterr().err) and "the tokenizer does not load" in err
    )


def test_an_impossible_sampling(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, argv(flags, "--eval.temperature", "0.7"))
    assert "--eval.temperature 0.7" in line and "--rollout.temperature 1" in line


def test_adapters_for_modules_that_the_model_does_not_have(
    flags: Flags, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    line = refused(capsys, argv(flags, "--ds.lora.rank", "4", "--ds.lora.target_modules", "c_attn"))
    assert flags["actor.model_name_or_path"] in line and "--ds.lora.target_modules c_attn" in line and not started
    assert main(argv(flags, "--ds.lora.rank", "4", "--ds.lora.target_modules", "q_proj", "v_proj")) == 0
    assert len(started) == 1


def test_a_checkpoint_remembers_its_adapters(flags: Flags) -> None:
    def adapters(*more: str) -> str:
        return run_identity(load_inputs(parse_args(argv(flags, *more)))).adapters

    assert adapters() == "none"
    assert adapters("--ds.lora.rank", "4") == "rank 4, alpha 16, beside all-linear"
    one, two = (
        adapters("--ds.lora.rank", "4", "--ds.lora.target_modules", *names)
        for names in (("v_proj", "q_proj"), ("q_proj", "v_proj"))
    )
    assert one == two == "rank 4, alpha 16, beside q_proj v_proj"


def test_too_few_prompts_for_one_step_are_found_by_a_dry_run(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    flags["rollout.batch_size"] = "64"
    assert "24 prompts x --train.num_episodes 1 do not fill one step" in refused(capsys, argv(flags, "--dry_run"))


def test_too_few_prompts_for_one_step_are_found_before_a_run(
    flags: Flags, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    flags["rollout.batch_size"] = "64"
    assert "24 prompts x --train.num_episodes 1 do not fill one step" in refused(capsys, argv(flags))
    assert started == [] and not Path(flags["ckpt.output_dir"]).exists()


def test_what_the_log_or_the_cluster_refuses_is_wrong_input_too(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(plan: RunPlan, checkpoint: object, kept: object, **more: object) -> None:
        raise RunLogError("--logger.tensorboard_dir '/x' cannot be written")

    monkeypatch.setattr(module, "launch", run)
    assert "--logger.tensorboard_dir" in refused(capsys, argv(flags))


def test_a_failure_of_the_run_is_no_input_error(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(plan: RunPlan, checkpoint: object, kept: object, **more: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(module, "launch", run)
    with pytest.raises(ValueError, match="a bug"):
        main(argv(flags))


@pytest.mark.parametrize("error", [RunError("the engine died"), ValueError("a bug")])
def test_what_libraries_said_last_is_shown_when_a_run_fails(
    error: Exception, flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(plan: RunPlan, checkpoint: object, kept: object, **more: object) -> None:
        (Path(flags["ckpt.output_dir"]) / LIBRARIES_FILE).write_text("the cause, said by a library\n")
        raise error

    monkeypatch.setattr(module, "launch", run)
    with nullcontext() if isinstance(error, RunError) else pytest.raises(ValueError, match="a bug"):
        assert main(argv(flags)) == 1
    shown = capsys.readouterr().err
    assert "  the cause, said by a library\n" in shown and str(Path(flags["ckpt.output_dir"]) / LIBRARIES_FILE) in shown
    assert ("error: the engine died" in shown) == isinstance(error, RunError)


def test_what_libraries_said_in_an_earlier_run_is_not_taken_for_the_cause(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries = Path(flags["ckpt.output_dir"]) / LIBRARIES_FILE
    libraries.parent.mkdir()
    libraries.write_text("said long ago\n")

    def plan(inputs: object) -> RunPlan:
        raise RunError("the plan cannot be made")

    def planned_late(inputs: object) -> RunPlan:
        with libraries.open("a") as file:
            file.write("said now\n")
        return plan(inputs)

    monkeypatch.setattr(module, "make_plan", plan)
    assert main(argv(flags)) == 1
    told = capsys.readouterr().err
    assert told.endswith("error: the plan cannot be made\n") and "said long ago" not in told
    monkeypatch.setattr(module, "make_plan", planned_late)
    assert main(argv(flags)) == 1
    assert "  said now\n" in capsys.readouterr().err


# -- the device ------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def device_name(config: Config) -> str | None:
    device = known_device(config)
    return None if device is None else device.name


def test_auto_is_this_machine_unless_a_cluster_is_joined(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_args(argv(flags))
    pretend(monkeypatch, 0)
    assert device_name(config) == "cpu"
    pretend(monkeypatch, 1)
    assert device_name(config) == "cuda"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert known_device(config) is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert known_device(parse_args(argv(flags, "--ray.address", "head:6379"))) is None
    assert device_name(parse_args(argv(flags, "--ray.address", "local"))) == "cuda"


def test_the_device_that_is_asked_for(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0)
    assert device_name(parse_args(argv(flags, "--real.device", "cpu"))) == "cpu"
    # A head node without GPUs may well lead a cluster that has them.
    assert device_name(parse_args(argv(flags, "--real.device", "cuda", "--ray.address", "head:6379"))) == "cuda"


def test_gpus_that_are_not_there(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 0)
    assert "device 'cuda' was asked for" in refused(capsys, argv(flags, "--real.device", "cuda"))


def test_checks_that_depend_on_the_device_see_auto_resolved(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 0)
    arguments = argv(flags, "--vllm.tensor_parallel_size", "2")
    assert "--vllm.tensor_parallel_size 2 needs GPUs" in refused(capsys, arguments)
    assert "--ds.adam_offload on a CPU" in " ".join(load_inputs(parse_args(argv(flags, "--ds.adam_offload"))).warnings)
    # On a cluster nobody knows yet.
    load_inputs(parse_args([*arguments, "--ray.address", "head:6379"]))


# -- what an engine can do, known before any starts ----------------------------------------------------------


def rewritten(model: Path, folder: Path, **changes: object) -> Path:
    """A copy of the model with another configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_scale_of_more_tokens_than_an_engine_returns(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": f"score {i}", "label": i} for i in range(64)])
    words = ["<unk>", "</s>", "score", *(str(i) for i in range(130))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    flags["actor.model_name_or_path"] = str(
        rewritten(Path(flags["actor.model_name_or_path"]), tmp_path / "m", vocab_size=len(words))
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "m")
    del flags["eval.dataset"]
    assert main(argv(flags, "--dry_run", "--real.scale", "0-127")) == 0
    capsys.readouterr()
    line = refused(capsys, argv(flags, "--dry_run", "--real.scale", "0-128"))
    assert "--real.scale 0-128, --real.anchor: the scale's labels have 129 different tokens" in line
    assert "at most 128" in line


@pytest.mark.parametrize(
    ("changes", "more", "says"),
    [
        ({"max_position_embeddings": 31}, [], "--data.max_len 32 is more than the model's 31 positions"),
        ({}, ["--vllm.tensor_parallel_size", "4", "--ray.address", "a:1"], "size 4 must divide the model's 2 "),
        ({"vocab_size": 16}, [], "hold the token 16, but the model's vocabulary ends at 15"),
        ({}, ["--train.seed", str(2**31)], "--train.seed must be a whole number >= 0 and <= 2147483647"),
    ],
)
def test_what_no_engine_of_the_model_can_do(
    flags: Flags, changes: Flags, more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags["actor.model_name_or_path"] = str(
        rewritten(Path(flags["actor.model_name_or_path"]), tmp_path / "m", **changes)
    )
    assert says in refused(capsys, argv(flags, "--dry_run", *more))


def test_engine_and_policy_are_compared_on_prompts_of_two_tokens_or_more(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "fine", "label": 3}] * 9
    write_rows(tmp_path / "train.jsonl", [*rows, {"prompt": "fine judge", "label": 3}])
    assert [len(probe) for probe in probe_sequences(load_inputs(parse_args(argv(flags))))] == [2]
    write_rows(tmp_path / "train.jsonl", rows)
    assert "every prompt is a single token" in refused(capsys, argv(flags, "--dry_run"))


# -- the tokenizer ---------------------------------------------------------------------------------------


def test_end_tokens_come_from_tokenizer_and_generation_config(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    assert end_token_ids(str(tmp_path), tokenizer) == {1}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 6]}))
    assert end_token_ids(str(tmp_path), tokenizer) == {1, 5, 6}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_token_ids(str(tmp_path), tokenizer) == {1, 7}


def test_a_model_that_never_ends(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither the tokenizer nor the generation config names an end-of-text token"):
        end_token_ids(str(tmp_path), tokenizer)


@pytest.mark.parametrize(("saved", "code"), [(True, 85), (False, 1)])
def test_a_signal_ends_with_the_code_that_means_resume(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, saved: bool, code: int
) -> None:
    def run(plan: RunPlan, checkpoint: object, kept: object, **more: object) -> None:
        raise Stopped(3, "SIGTERM", saved)

    monkeypatch.setattr(module, "launch", run)
    assert main(argv(flags)) == code


def test_a_checkpoint_that_is_not_there_is_wrong_input(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    assert "checkpoint" in refused(capsys, [*argv(flags), "--ckpt.load", "latest"])


def saved_checkpoint(arguments: list[str], **changes: object) -> Path:
    """A complete checkpoint of step 1 of the run that these arguments describe, but for the changes."""
    inputs = load_inputs(parse_args(arguments))
    meta = CheckpointMeta(identity=replace(run_identity(inputs), **changes), weight_version=1)
    store = make_store(inputs.config.ckpt.folder, keep=1, metric=None)
    with store.begin(1, meta) as writer:
        writer.write_json("controller.json", {"step_number": 1})
        (writer.path / "policy").mkdir()
        (writer.path / "policy" / "rank_0.pt").write_bytes(b"weights")
        return writer.commit().path


def test_a_checkpoint_is_resumed(flags: Flags, started: list[RunPlan]) -> None:
    made = saved_checkpoint(argv(flags))
    for which in ("latest", "auto", str(made)):
        assert main([*argv(flags), "--ckpt.load", which]) == 0
    assert len(started) == 3


def test_a_checkpoint_of_another_model(
    flags: Flags, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    saved_checkpoint(argv(flags), model_sha256="0" * 64, zero_stage=3)
    for which in ("latest", "auto"):
        assert main([*argv(flags), "--ckpt.load", which]) == 2
        assert "error: the checkpoint belongs to another run:\n  model config" in capsys.readouterr().err
    # What no force can make fit.
    assert main([*argv(flags), "--ckpt.load", "latest", "--ckpt.force"]) == 2
    assert "ZeRO stage: 3 in the checkpoint, 2 now" in capsys.readouterr().err
    assert started == []


def test_a_half_copied_checkpoint(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    made = saved_checkpoint(argv(flags))
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    (copy / "policy" / "rank_0.pt").write_bytes(b"wei")
    assert "rank_0.pt has 3 bytes, not 7" in refused(capsys, [*argv(flags), "--ckpt.load", str(copy)])
    (copy / "policy" / "rank_0.pt").write_bytes(b"weightz")
    assert "hash differs" in refused(capsys, [*argv(flags), "--ckpt.load", str(copy)])
    (copy / "manifest.json").unlink()
    assert "manifest.json is missing" in refused(capsys, [*argv(flags), "--ckpt.load", str(copy)])
    assert started == []


def test_checkpoint_paths_that_cannot_be_used(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    # Also without --ckpt.save_steps: a signal would want to save.
    for folder, says in ((file, "is a file"), (file / "below", "is a file"), (Path("/proc/none"), "cannot be written")):
        line = refused(capsys, [*argv(flags), "--ckpt.path", str(folder)])
        assert str(folder) in line and says in line
    assert "is a file; give the folder" in refused(capsys, [*argv(flags), "--ckpt.load", str(file)])
    assert "there is no checkpoint" in refused(capsys, [*argv(flags), "--ckpt.load", str(tmp_path / "none")])
    assert started == []


@pytest.mark.parametrize("flag", ["--ckpt.output_dir", "--ckpt.path"])
@pytest.mark.parametrize("load", ["none", "auto"])
def test_a_second_run_in_the_folders_of_a_live_one(
    flag: str,
    load: str,
    flags: Flags,
    tmp_path: Path,
    started: list[RunPlan],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags["ckpt.path"] = str(tmp_path / "checkpoints")
    folder = Path(flags[flag.removeprefix("--")])
    command = argv(flags, "--ckpt.load", load)

    def live(plan: RunPlan, checkpoint: object, kept: object, **more: object) -> None:
        for name in ("ckpt.output_dir", "ckpt.path"):
            with pytest.raises(FolderInUseError):
                FolderLock(flags[name], f"--{name}")

    with FolderLock(folder, "other"):
        line = refused(capsys, command)
        assert f"{flag} {folder} is in use" in line and started == []
        # A dry run writes nothing.
        assert main([*command, "--dry_run"]) == 0
        capsys.readouterr()
    monkeypatch.setattr(module, "launch", live)
    assert main(command) == 0
    assert not list(tmp_path.rglob(LOCK_FILE))


def test_checkpoints_may_lie_in_the_output_folder_itself(flags: Flags, started: list[RunPlan]) -> None:
    flags["ckpt.path"] = flags["ckpt.output_dir"]
    assert main(argv(flags)) == 0 and len(started) == 1


def test_a_run_that_is_refused_leaves_no_folder(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(flags["ckpt.output_dir"])
    refused(capsys, argv(flags, "--rollout.batch_size", "999"))
    assert not out.exists()


def test_auto_begins_again_what_ended_before_its_first_checkpoint(
    flags: Flags, capsys: pytest.CaptureFixture[str], started: list[RunPlan]
) -> None:
    out = Path(flags["ckpt.output_dir"])
    again = [*argv(flags), "--ckpt.load", "auto"]
    assert main(again) == 0  # makes checkpoints/
    assert main(again) == 0
    (out / "run_config.json").write_text("{}")
    (out / "metrics.jsonl").write_text("")
    assert main(again) == 0
    capsys.readouterr()
    assert "is not empty" in refused(capsys, argv(flags))
    # A broken checkpoint or a judge is never written over.
    (out / "checkpoints" / "step_1").mkdir()
    assert "is not empty" in refused(capsys, again)
    (out / "checkpoints" / "step_1").rmdir()
    (out / "model").mkdir()
    assert "is not empty" in refused(capsys, again)
    assert len(started) == 3


def test_several_named_benchmarks(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "more.jsonl", [{**row, "group": f"q{i // 2}"} for i, row in enumerate(make_rows(4, seed=2))])
    flags["eval.dataset"] = f"flask={tmp_path / 'test.jsonl'},mt_bench={tmp_path / 'more.jsonl'}"
    inputs = load_inputs(parse_args(argv(flags, "--ckpt.best_metric_key", "mt_bench/expected/spearman")))
    assert [(b.name, len(b.prompts)) for b in inputs.benchmarks] == [("flask", 6), ("mt_bench", 4)]
    assert inputs.benchmarks[1].groups == ("q0", "q0", "q1", "q1")
    assert main(argv(flags, "--ckpt.best_metric_key", "mtbench/expected/spearman")) == 2
    error = capsys.readouterr().err
    assert "--ckpt.best_metric_key" in error and "did you mean 'mt_bench/expected/spearman'?" in error
    flags["eval.dataset"] = "flask=missing.jsonl"
    assert main(argv(flags)) == 2 and "missing.jsonl" in capsys.readouterr().err


def test_a_forced_anchor_needs_room_in_evaluation_prompts(flags: Flags) -> None:
    flags["data.max_len"] = "17"  # 9 for prompts of up to 9 tokens; the anchor and its tail need some of them
    load_inputs(parse_args(argv(flags)))
    with pytest.raises(ValueError, match="left for it"):
        load_inputs(parse_args(argv(flags, "--eval.force_anchor")))
