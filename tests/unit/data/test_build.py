"""Built data sets: groups never cross splits, what is written is what training reads, bad rows are named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from real_openrlhf.data.__main__ import main
from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.sources import read_rows
from real_openrlhf.data.table import schema, template_of_built

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not at ../shared/data beside the checkout")
MAP = (
    "--map",
    "instruction=q",
    "response=a",
    "label=y",
    "feedback=f",
    "--template",
    "single_answer",
    "--scale",
    "1-10",
)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """40 questions of 3 answers each, the last answer's label fractional, its feedback with its verdict."""
    return [
        {"q": f"Question {i}?", "a": f"Answer {k}", "y": (1, 7, 8.5)[k], "f": f"Fine {k}. Rating: [[{(1, 7, 8.5)[k]}]]"}
        for i in range(40)
        for k in range(3)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(folder: Path, source: object, *more: str) -> int:
    return main(["generic", "--source", str(source), "--output_dir", str(folder), *MAP, *more])


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def test_no_group_crosses_splits_and_no_row_is_lost(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    out = tmp_path / "out"
    assert build(out, write(tmp_path / "a.jsonl", rows), "--split", "train=0.6,dev=0.2,test=0.2") == 0
    splits = {name: read(out, name) for name in ("train", "dev", "test")}
    questions = {name: {row["judged"]["instruction"] for row in found} for name, found in splits.items()}
    assert all(len(found) == 3 * len(questions[name]) for name, found in splits.items())
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 40
    assert {row["split"] for row in splits["dev"]} == {"dev"}


def test_rows_that_share_no_group_are_pointed_out_where_they_are_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"p": f"Judge answer {i} to one question.", "y": 3, "q": i // 4} for i in range(40)]
    source = write(tmp_path / "a.jsonl", rows)
    flags = ["generic", "--source", str(source), "--scale", "1-5", "--map", "prompt=p", "label=y"]
    told = "every row is its own group"
    for name, more, expected in (
        ("split", ["--split", "train=0.5,test=0.5"], True),
        ("whole", [], False),
        ("grouped", ["group=q", "--split", "train=0.5,test=0.5"], False),
    ):
        assert main([*flags, *more, "--output_dir", str(tmp_path / name)]) == 0
        assert (told in capsys.readouterr().out) is expected


def test_the_split_of_a_question_does_not_depend_on_the_rest(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    homes = []
    for name, some in (("a", rows), ("b", rows[60:][::-1])):
        build(tmp_path / name, write(tmp_path / f"{name}.jsonl", some), "--split", "train=0.5,test=0.5")
        homes.append(
            {r["judged"]["instruction"]: r["split"] for s in ("train", "test") for r in read(tmp_path / name, s)}
        )
    assert homes[1].items() <= homes[0].items() and len(homes[1]) == 20


def test_files_repeat_and_the_manifest_describes_them(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    source = write(tmp_path / "a.jsonl", rows)
    for name in ("one", "two"):
        assert build(tmp_path / name, source, "--sft", "--shuffle", "--seed", "3") == 0
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert one["files"] == two["files"]
    for name, entry in one["files"].items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == entry["sha256"]
        assert len(read(tmp_path / "one", name.removesuffix(".parquet"))) == entry["rows"] == 120
    assert pq.read_schema(tmp_path / "one" / "train.parquet").equals(schema("text"))
    assert (one["schema_version"], one["builder"], one["seed"], one["scale"]) == (
        1,
        "generic",
        3,
        "1,2,3,4,5,6,7,8,9,10",
    )
    assert one["splits"]["train"]["fractional_labels"] == 40 and one["sources"][0]["rows"] == 120
    assert len(one["template"]["sha256"]) == 64 and "--sft" in one["command"]
    # A folder with its manifest is still a data set by its split.
    assert sum(1 for _ in read_rows(f"{tmp_path / 'one'}@train")) == 120


def test_feedback_without_a_label_of_its_own_is_left_out(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows = rows[:4]
    rows[0]["f"] = "Rating: [[1]]."
    rows[1]["f"] = "Fine. Rating: [[6]]"
    rows[2]["n"] = 2
    build(
        tmp_path / "out",
        write(tmp_path / "a.jsonl", [{"n": 1, **row} for row in rows]),
        "--map",
        *MAP[1:5],
        "n=n",
        "--sft",
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["feedback_left_out"] == {
        "it holds nothing but its verdict": 1,
        "its own verdict is not the label": 1,
        "several judgements were averaged": 1,
    }
    assert [row["feedback"] for row in read(tmp_path / "out", "train")] == [None, None, None, "Fine 0."]
    # The rows stay: train_warmup has a model write what they lack.
    responses = [row["response"] for row in read(tmp_path / "out", "sft")]
    assert [text is None for text in responses] == [True, True, True, False]


def test_labels_alone_are_a_start_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": f"Q{i}", "a": "A", "y": 1 + i} for i in range(6)]
    words = ["--source", str(write(tmp_path / "a.jsonl", rows)), "--map", *MAP[1:4], "--scale", "1-10"]
    words += ["--template", "single_answer", "--output_dir", str(tmp_path / "o"), "--sft"]
    assert main(["generic", *words]) == 0
    assert [(row["label"], row["response"]) for row in read(tmp_path / "o", "sft")] == [(r["y"], None) for r in rows]
    assert "sft.parquet --warmup.feedback missing --real.scale" in capsys.readouterr().out


def test_a_prompt_that_holds_its_feedback_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "q": "Say it.",
        "a": "As you said: It lacks depth and detail. Score: 2",
        "y": 2,
        "f": "It lacks depth and detail. Score: 2",
    }
    assert build(tmp_path / "out", write(tmp_path / "a.jsonl", [row])) == 2
    assert "the prompt holds the feedback" in capsys.readouterr().err


def test_a_short_critique_may_occur_in_the_prompt(tmp_path: Path) -> None:
    row = {"q": "Say it.", "a": "Good. Here it is.", "y": 2, "f": "Good. Score: 2"}
    assert build(tmp_path / "out", write(tmp_path / "a.jsonl", [row]), "--sft") == 0
    assert [r["response"] for r in read(tmp_path / "out", "sft")] == ["Good. So the overall score is 2"]
    # With its verdict it says the label.
    row["a"] = "They wrote: Good. Score: 2"
    assert build(tmp_path / "out2", write(tmp_path / "b.jsonl", [row]), "--sft") == 2


def test_a_closing_number_like_the_label_is_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"q": f"Q{i}", "a": "A", "y": y, "f": text}
        for i, (y, text) in enumerate([(7, "Clear. Verdict of the panel 7"), (6, "It has 6 rows of 7"), (4, "4")])
    ]
    assert build(tmp_path / "out", write(tmp_path / "a.jsonl", rows), "--sft") == 0
    assert [r["feedback"] for r in read(tmp_path / "out", "train")] == ["Clear.", "It has 6 rows of 7", None]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["feedback_cut"] == {"its last sentence ended with its label": 2}
    assert "its last sentence ended with its label: 2" in capsys.readouterr().out


def test_labels_of_words_and_below_zero_are_not_left_in_the_feedback(tmp_path: Path) -> None:
    texts = {
        "1=Bad,2=Good": [(2, "Clear. Verdict: Good"), (1, "Short. Overall: 1"), (2, "A good, clear text.")],
        "-2-2": [(-1, "Clear. Score: -1"), (1, "Short. Score: 1"), (-2, "Odd. It says -2")],
        "1-2": [(1, "Clear. Score:-1"), (2, "Short. Score: 1"), (2, "Odd. All in all: 2.0")],
    }
    made = {}
    for number, (scale, critiques) in enumerate(texts.items()):
        rows = [{"p": f"Prompt {i}", "y": label, "f": text} for i, (label, text) in enumerate(critiques)]
        source = write(tmp_path / f"{number}.jsonl", rows)
        out, columns = tmp_path / f"out{number}", ("prompt=p", "label=y", "feedback=f")
        words = ["--source", str(source), "--scale", scale, "--map", *columns, "--output_dir", str(out), "--sft"]
        assert main(["generic", *words]) == 0
        made[scale] = [row["feedback"] for row in read(out, "train")]
    assert made["1=Bad,2=Good"] == ["Clear.", "Short.", "A good, clear text."]
    assert made["-2-2"] == ["Clear.", "Short.", "Odd."]
    assert made["1-2"] == ["Clear.", None, "Odd."]


def test_a_critique_of_a_sentence_may_occur_in_the_prompt(tmp_path: Path) -> None:
    text = "The response is partially correct."
    row = {"q": f"Rate it. 2: {text}", "a": "A", "y": 2, "f": text}
    assert build(tmp_path / "out", write(tmp_path / "a.jsonl", [row]), "--sft") == 0
    assert [r["response"] for r in read(tmp_path / "out", "sft")] == [f"{text} So the overall score is 2"]
    row["f"] = row["a"] = f"{text} It names the cause, but neither the year nor the place."
    assert build(tmp_path / "out2", write(tmp_path / "b.jsonl", [row]), "--sft") == 2


def test_half_a_character_is_a_bad_row_of_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"q": "Q", "a": "A", "y": 3, "f": "Fine."}
    path = tmp_path / "a.jsonl"
    for column in ("q", "f"):
        bad = json.dumps({**good, "q": "Q2", column: "half \ud800"})
        path.write_text(json.dumps(good) + "\n" + bad + "\n", encoding="utf-8")
        assert build(tmp_path / "out", path) == 2
        assert f"a.jsonl, line 2, column '{column}': not valid Unicode" in capsys.readouterr().err
        assert build(tmp_path / f"out_{column}", path, "--skip_bad_rows") == 0
        assert len(read(tmp_path / f"out_{column}", "train")) == 1 and "bad rows left out: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": 11}, "a.jsonl, line 2, column 'y': 11.0 is off the scale"),
        ({"y": "good"}, "line 2, column 'y': 'good' is not a number"),
        ({"q": None}, "line 2, column 'q': expected text, got None"),
        ({"a": 3}, "line 2, column 'a': expected text, got 3"),
    ],
)
def test_bad_rows_stop_or_are_counted(
    tmp_path: Path, rows: list[dict[str, Any]], change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [rows[0], {**rows[1], **change}, rows[2]])
    assert build(tmp_path / "out", source) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert build(tmp_path / "out", source, "--skip_bad_rows") == 0
    assert "bad rows left out: 1" in capsys.readouterr().out
    bad = json.loads((tmp_path / "out" / "manifest.json").read_text())["bad_rows"]
    assert bad["count"] == 1 and message in bad["first"][0] and len(read(tmp_path / "out", "train")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vicuna", "--source", "x.json"], "no builder 'vicuna' (did you mean 'vicuna_bench'?)"),
        (["vicuna_bench"], "vicuna_bench needs --source"),
        (["vicuna_bench", "--source", "gone.json"], "gone.json: there is no such file"),
        (["vicuna_bench", "--source", "{}", "--template", "papr"], "did you mean 'paper'"),
        (["vicuna_bench", "--source", "{}", "--template", "single_answer"], "asks for scores 1-10"),
        (["vicuna_bench", "--source", "{}", "--map", "label=y"], "--map belongs to the builder generic"),
        (["vicuna_bench", "--source", "{}"], "column 'instruction': no such column"),
        (["vicuna_bench", "--source", "train={}", "{}"], "every source names its split"),
        (["generic", "--source", "{}", "--map", "prompt=q", "label=y"], "generic needs --scale"),
        (["generic", "--source", "{}", "--scale", "1-10", "--map", "instruction=q"], "generic needs --template"),
        (["generic", "--source", "{}", "--scale", "1-10", "--map", "prompt"], "write FIELD=COLUMN"),
    ],
)
def test_bad_commands(
    tmp_path: Path, rows: list[dict[str, Any]], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write(tmp_path / "a.jsonl", rows))
    code = main([*(word.replace("{}", source) for word in arguments), "--output_dir", str(tmp_path / "out")])
    assert code == 2 and message in capsys.readouterr().err


def test_an_old_data_set_is_replaced_only_when_asked(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out"
    build(out, source, "--sft")
    assert build(out, source) == 2 and "pass --overwrite" in capsys.readouterr().err
    assert build(out, source, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train.parquet"]


@needs_data
def test_vicuna_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, source = tmp_path / "out", str(DATA / "vicuna_eval.json")
    assert main(["vicuna_bench", "--source", source, "--output_dir", str(out)]) == 0
    given, built = json.loads(Path(source).read_text(encoding="utf-8")), read(out, "test")
    assert [row["prompt"] for row in built] == [row["instruction"] for row in given]
    assert [row["label"] for row in built] == [pytest.approx(sum(row["gpt4_score"]) / 3) for row in given]
    assert len({row["group"] for row in built}) == 80 and all(row["feedback"] is None for row in built)
    assert "--real.scale 1,2,3,4,5 --real.anchor 'So the overall score is '" in capsys.readouterr().out


def test_the_template_of_a_built_file_is_found_again(tmp_path: Path) -> None:
    row = {"q": "Q", "a": "A", "y": 3, "f": "Fine."}
    assert build(tmp_path / "out", write(tmp_path / "a.jsonl", [row])) == 0
    name = json.loads((tmp_path / "out" / "manifest.json").read_text())["template"]["name"]
    for source in (tmp_path / "out" / "train.parquet", tmp_path / "out"):
        assert template_of_built(str(source)) == JudgeTemplate.load(name)
    # Other files, and prompts that were kept whole, have none.
    assert template_of_built(str(tmp_path / "a.jsonl")) is None and template_of_built("owner/name") is None
    whole = write(tmp_path / "b.jsonl", [{"p": "Whole.", "y": 3}])
    words = ["--source", str(whole), "--scale", "1-5", "--map", "prompt=p", "label=y", "--output_dir"]
    assert main(["generic", *words, str(tmp_path / "whole")]) == 0
    assert template_of_built(str(tmp_path / "whole")) is None


@needs_data
def test_the_counts_in_the_readme_are_what_is_built(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[3] / "real_openrlhf/data/README.md").read_text(encoding="utf-8")
    words = ["mtbench_pool", "--sft", "--skip_bad_rows", "--source", str(DATA / "mtbench_judgments.jsonl.gz")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    counts = {split: f"{manifest['splits'][split]['rows']:,}" for split in ("train", "dev", "test", "sft")}
    (line,) = (line for line in readme.splitlines() if line.startswith("| `mtbench_pool --sft"))
    assert [f"{split} {count}" for split, count in counts.items() if f"{split} {count} (" not in line] == []
