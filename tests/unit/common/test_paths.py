"""~ is the home folder in every path flag of every command, also as --flag=~/x, where a shell leaves it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from real_openrlhf import evaluate, train_warmup
from real_openrlhf.common.paths import expand, looks_like_a_path, path_argument, text_argument
from real_openrlhf.config.cli import parse_args
from real_openrlhf.data import __main__ as data
from real_openrlhf.judge import cli as judge
from real_openrlhf.judge.cli_tools import fit_args, serve_args
from real_openrlhf.judge.output import open_output
from real_openrlhf.judge.rubrics import read_rubric
from tests.helpers.tiny_judge import make_rows, write_rows


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a blank and letters beyond ASCII; the working folder is another."""
    folder = tmp_path / "mon dossier 数据"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_what_is_expanded(home: Path) -> None:
    assert expand("~/a b/x") == f"{home}/a b/x" and expand("~") == str(home)
    for text in ("a~/x", "./~/x", "owner/name", "none", "/données/x y", "", "~nobody-of-this-name/x"):
        assert expand(text) == text
    assert path_argument("~/x") == home / "x" and text_argument("owner/name@test") == "owner/name@test"
    for blank in ("", "  "):
        with pytest.raises(argparse.ArgumentTypeError, match="is blank"):
            path_argument(blank)


def test_what_is_meant_as_a_path() -> None:
    assert all(looks_like_a_path(text) for text in ("/a", "./a", "../a", "~x/a", "a/b/c", "a/", ".\\a"))
    assert not any(looks_like_a_path(text) for text in ("name", "owner/name", "owner/name.v1"))


def test_every_path_of_every_command(home: Path) -> None:
    assert data.parse_args(["generic", "--output_dir=~/x"]).output_dir == home / "x"
    folders = ["--actor.model_name_or_path=~/m", "--data.prompt_dataset=~/d", "--ckpt.output_dir=~/x"]
    warmup = parse_args(folders, warmup=True)
    assert warmup.actor.model_name_or_path == f"{home}/m" and warmup.ckpt.output_dir == f"{home}/x"
    found = evaluate.parse_args(["--model=~/m", "--output_dir=~/x", "--feedback_of=~/y", "--compare", "~/a", "~/b"])
    assert found.model == f"{home}/m" and found.output_dir == home / "x" and found.feedback_of == home / "y"
    assert found.compare == [home / "a", home / "b"]
    assert judge.parse_args(["--model=~/m", "--input=~/i"]).model == f"{home}/m"
    assert serve_args(["--model=~/m"]).model == f"{home}/m"
    assert fit_args(["--model=~/m", "--data=~/d"]).model == f"{home}/m"


def test_a_data_set_is_built_in_the_home_folder(home: Path) -> None:
    write_rows(home / "rows é.jsonl", make_rows(40, seed=0))
    words = ["generic", "--scale", "1-5", "--map", "prompt=prompt", "label=label"]
    words += ["--source=~/rows é.jsonl", "--output_dir=~/built 1"]
    assert data.main(words) == 0
    assert (home / "built 1" / "train.parquet").is_file() and list(Path.cwd().iterdir()) == []
    # And read again from there.
    assert data.main([*words[:5], "label=label", "--source=~/built 1/train.parquet", "--output_dir=~/again"]) == 0
    assert data.main([*words[:5], "label=label", "--source", "train=~/rows é.jsonl", "--output_dir=~/named"]) == 0


def test_a_model_that_is_not_there_is_a_missing_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(home / "rows.jsonl", make_rows(4, seed=0))
    calls = (
        (
            train_warmup.main,
            ["--actor.model_name_or_path=~/m", "--data.prompt_dataset=~/rows.jsonl", "--ckpt.output_dir=~/x"],
        ),
        (judge.main, ["--model=~/m", "--input=~/rows.jsonl", "--scale=1-5"]),
        (evaluate.main, ["--model=~/m", "--benchmark=~/rows.jsonl", "--output_dir=~/x", "--scale=1-5"]),
    )
    for main, words in calls:
        assert main(words) == 2
        assert f"{str(home / 'm')!r}: there is no such folder" in capsys.readouterr().err


def test_the_judges_files(home: Path) -> None:
    with open_output("~/out é/x y.jsonl", overwrite=False, resume=False, identity={}) as out:
        out.write({"a": 1})
    assert json.loads((home / "out é/x y.jsonl").read_text()) == {"a": 1} and list(Path.cwd().iterdir()) == []
    (home / "r.txt").write_text("Is it right?")
    (home / "r.json").write_text(json.dumps({"tone": "Is it polite?"}))
    assert read_rubric("~/r.txt", "--rubric") == "Is it right?" and read_rubric("~/r.json", "--rubric") == {
        "tone": "Is it polite?"
    }
