"""Feedback that a model writes before a warm-up: which rows, its record, and where an interrupted start goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import pytest

from real_openrlhf.common.errors import RunError
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.controller.output_folder import check_output_dir
from real_openrlhf.data.completed import Completed
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.run import feedback
from real_openrlhf.run.inputs import load_inputs
from real_openrlhf.run.plan import RunPlan, make_plan
from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("warmup")
    make_judge(path / "m", steps=0)
    rows = make_rows(8, seed=0)
    for row in rows[::2]:
        row["response"] = f"because fine {ANCHOR}{row['label']}"
    write_rows(path / "rows.jsonl", rows)
    return path


def plan(folder: Path, out: Path, *flags: str) -> RunPlan:
    words = ["--actor.model_name_or_path", str(folder / "m"), "--data.prompt_dataset", str(folder / "rows.jsonl")]
    words += [
        "--data.max_len",
        "32",
        "--rollout.max_new_tokens",
        "12",
        "--train.batch_size",
        "4",
        "--real.anchor",
        ANCHOR,
    ]
    words += ["--real.device", "cpu", "--ckpt.output_dir", str(out), *flags]
    return make_plan(load_inputs(parse_args(words, warmup=True)))


class Writer:
    """Stands for the engines: writes the row's number of words, and may be interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends_after: int | None = None, empty: bool = False) -> None:
        self.asked: list[int] = []
        self.models: list[str] = []
        self.ends_after, self.empty = ends_after, empty
        monkeypatch.setattr(feedback, "_write", self.write)

    def write(
        self, plan: RunPlan, prompts: Sequence[Prompt], model: str, terminal: TextIO
    ) -> Iterator[tuple[Prompt, Completed]]:
        self.models.append(model)
        print("the engine has started")
        print("a bar", file=terminal)
        for prompt in prompts:
            if self.ends_after == len(self.asked):
                raise KeyboardInterrupt
            self.asked.append(prompt.row)
            ended = "empty" if self.empty else "anchor"
            yield prompt, Completed(response_ids=(3, prompt.row, 1), feedback=f"text {prompt.row}", ended=ended)


@pytest.mark.parametrize(("which", "rows"), [("missing", [1, 3, 5, 7]), ("sampled", list(range(8)))])
def test_the_rows_that_are_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, rows: list[int]
) -> None:
    writer = Writer(monkeypatch)
    before = plan(folder, tmp_path, "--warmup.feedback", which)
    assert before.inputs.given is not None and before.inputs.given.without == (1, 3, 5, 7)
    after = feedback.with_feedback(before, "judge")
    assert writer.asked == rows and writer.models == ["judge"]
    assert after.inputs.given is not None and after.inputs.given.without == ()
    written = {row: ids for row, ids in after.inputs.given.responses.items() if ids == (3, row, 1)}
    assert sorted(written) == rows
    assert after.identity.data_sha256 != before.identity.data_sha256
    lines = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines[1:]] == rows and lines[2]["feedback"] == f"text {rows[1]}"


def test_what_libraries_say_meanwhile_is_in_their_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        Writer(monkeypatch, ends_after=2)
        with pytest.raises(KeyboardInterrupt):
            feedback.with_feedback(plan(folder, tmp_path, "--warmup.feedback", "sampled"))
        shown = capsys.readouterr()
        assert "the engine" not in shown.out + shown.err and "a bar" in shown.err
        print("after it")
        assert capsys.readouterr().out == "after it\n"
    lines = (tmp_path / "libraries.log").read_text().splitlines()
    assert [line for line in lines if "engine" in line] == ["the engine has started"] * 2
    # The run's own records may still begin there.
    assert check_output_dir(tmp_path) == tmp_path


def test_given_feedback_asks_nobody(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(monkeypatch)
    with pytest.raises(ValueError, match="line 2, column 'response': no such column"):
        plan(folder, tmp_path)
    skipping = plan(folder, tmp_path, "--data.skip_bad_rows")
    assert feedback.with_feedback(skipping) is skipping and writer.asked == []


def test_an_interrupted_start_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan(folder, tmp_path, "--warmup.feedback", "sampled")
    first = Writer(monkeypatch, ends_after=3)
    with pytest.raises(KeyboardInterrupt):
        feedback.with_feedback(wanted)
    record = tmp_path / "feedback.jsonl"
    record.write_bytes(record.read_bytes()[:-5])  # in the middle of its last line
    second = Writer(monkeypatch)
    (tmp_path / "other").mkdir()
    after = feedback.with_feedback(wanted)
    assert first.asked == [0, 1, 2] and second.asked == [2, 3, 4, 5, 6, 7]
    whole = feedback.with_feedback(plan(folder, tmp_path / "other", "--warmup.feedback", "sampled"))
    assert after.inputs.given is not None and whole.inputs.given is not None
    assert after.inputs.given.responses == whole.inputs.given.responses
    again = Writer(monkeypatch)
    assert feedback.with_feedback(wanted).identity == after.identity and again.asked == []


@pytest.mark.parametrize("flags", ["--train.seed 7", "--rollout.max_new_tokens 13", "--data.max_samples 4"])
def test_a_record_of_other_feedback_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    Writer(monkeypatch)
    feedback.with_feedback(plan(folder, tmp_path, "--warmup.feedback", "sampled"))
    with pytest.raises(ConfigError, match=r"feedback of another run \(other (seed|max_new_tokens|data)\); remove it"):
        feedback.with_feedback(plan(folder, tmp_path, "--warmup.feedback", "sampled", *flags.split()))
    with pytest.raises(ConfigError, match=r"other model"):
        feedback.with_feedback(plan(folder, tmp_path, "--warmup.feedback", "sampled"), "another")


@pytest.mark.parametrize("text", ["no json\n", '{"x": 1}\n', "[1]\n", '{"feedback_of": 3}\n'])
def test_what_is_no_record_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    Writer(monkeypatch)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "feedback.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"feedback.jsonl (is no|holds feedback of ano)"):
        feedback.with_feedback(plan(folder, tmp_path, "--warmup.feedback", "sampled"))


def test_a_model_that_writes_nothing_is_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer(monkeypatch, empty=True)
    with pytest.raises(RunError, match=r"wrote no feedback for any of 4 rows .*--data.apply_chat_template"):
        feedback.with_feedback(plan(folder, tmp_path, "--warmup.feedback", "missing"))


def test_the_dry_run_says_what_comes_first(folder: Path, tmp_path: Path) -> None:
    from real_openrlhf.run.plan_text import render

    text = render(plan(folder, tmp_path, "--warmup.feedback", "missing"))
    assert "before that, the model writes feedback for rows without a response" in text
    assert "its response, 5 tokens, which are learned:\n  because fine score" in text
    assert "policy: 1 x (1 CPU)" in text and "rollout" not in text.partition("Batch")[0]


def stages(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, code: int = 0) -> tuple[int, list[Any]]:
    from real_openrlhf.run import tract

    calls: list[Any] = []

    def run(config: Any, *, feedback_model: str | None = None, kept: Any = None) -> int:
        calls.append((config.ckpt.output_dir, config.warmup.method, config.warmup.feedback, feedback_model))
        return code

    monkeypatch.setattr(tract, "run", run)
    words = ["--actor.model_name_or_path", str(folder / "m"), "--data.prompt_dataset", "d", "--warmup.method", "tract"]
    return tract.run_tract(parse_args([*words, "--ckpt.output_dir", str(out)], warmup=True)), calls


def test_the_two_stages_of_tract(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = f"{tmp_path}/stage_1", str(tmp_path)
    code, calls = stages(folder, tmp_path, monkeypatch)
    assert code == 0
    assert calls == [(first, "raft", "given", None), (second, "tract", "sampled", f"{first}/model")]
    # A first stage that failed or was stopped ends it, with its code.
    assert stages(folder, tmp_path, monkeypatch, code=85) == (85, calls[:1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_engines_give_back_what_they_took(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The cluster may be somebody's who stays, and the training that follows needs the places."""
    calls: list[str] = []

    class Group:
        def __init__(self, *_: Any, group: Any, **__: Any) -> None:
            calls.append(f"start {group}")

        def ready(self) -> list[Any]:
            return []

        def shutdown(self) -> None:
            calls.append("shutdown")

    def get(_: Any) -> None:
        if fails:
            raise RuntimeError("an engine did not start")

    monkeypatch.setattr(feedback, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(feedback, "on_cluster", lambda plan, _: plan)
    monkeypatch.setattr(feedback, "passed_environment", dict)
    monkeypatch.setattr(feedback, "reserve", lambda *_: {"rollout": "here"})
    monkeypatch.setattr(feedback, "release", lambda places: calls.append(f"release {places['rollout']}"))
    monkeypatch.setattr(feedback, "RayRolloutGroup", Group)
    monkeypatch.setattr(feedback.ray, "get", get)
    with (
        pytest.raises(RuntimeError, match="did not start") if fails else nullcontext(),
        feedback._engines(plan(folder, tmp_path / "out", "--warmup.feedback", "missing"), "model"),
    ):
        calls.append("used")
    used = [] if fails else ["used"]
    assert calls == ["start here", *used, "shutdown", "release here"]
