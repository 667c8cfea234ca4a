"""The quickstart's scripts: the task's arithmetic, its tokenizer and model, and the report."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from examples.quickstart.task_files import write_files
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.export.settings import JudgeSettings

FOLDER = Path(__file__).parents[3] / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    """By path: other examples have modules of the same names."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


task, make_model, report = load("task"), load("make_model"), load("report")


ITEM = task.Item(
    rubric=(("detail", 2), ("slang", -1), ("rhyme", 1), ("quotes", -2)),
    lines=(("L03", "detail"), ("L04", "irony"), ("L05", "slang"), ("L06", "humour"), ("L07", "quotes")),
)


def test_irony_flips_the_sign_of_what_follows():
    assert task.tallies(ITEM, range(5)) == [2, 2, 3, 3, 5]
    # Whoever jumps over the irony arrives somewhere else.
    assert task.tallies(ITEM, [0, 2, 4]) == [2, 1, -1]


def test_prompt_and_careful_feedback_read_as_documented():
    config = task.TaskConfig(noise=0.0, slope=0.5)
    assert ITEM.prompt == (
        "rubric detail +2 slang -1 rhyme +1 quotes -2 answer L03 detail L04 irony L05 slang L06 humour L07 quotes judge"
    )
    assert task.feedback(ITEM, random.Random(0), config, careful=True) == (
        "L03 detail +2 L04 irony +2 L05 slang +3 L06 humour +3 L07 quotes +5"
    )
    assert task.label_of(ITEM, random.Random(0), config) == 5


def test_sloppy_feedback_jumps_lines_and_tallies_only_what_it_read():
    config = task.TaskConfig(slip_share=0.0)
    rng, n_lines = random.Random(1), []
    for _ in range(300):
        words = task.feedback(ITEM, rng, config, careful=False).split()
        visited = [[tag for tag, _ in ITEM.lines].index(tag) for tag in words[::3]]
        assert visited == sorted(set(visited))
        assert [int(w) for w in words[2::3]] == task.tallies(ITEM, visited)
        n_lines.append(len(visited))
    assert 2.0 < np.mean(n_lines) < 3.5


def test_slips_stay_in_the_tally():
    config = task.TaskConfig(slip_share=1.0, jumps=(1.0,))
    words = task.feedback(ITEM, random.Random(1), config, careful=False).split()
    errors = np.array([int(w) for w in words[2::3]]) - task.tallies(ITEM, range(5))
    assert set(np.abs(np.diff([0, *errors]))) == {1}


def test_the_label_is_worth_reasoning_for():
    """Careful tallies agree with labels much better than sloppy ones, or than sums that ignore the irony."""
    config, rng = task.TaskConfig(), random.Random(0)
    labels, careful, sloppy, direct = [], [], [], []
    for _ in range(3000):
        item = task.draw_item(rng, config)
        full = task.tallies(item, range(len(item.lines)))[-1]
        labels.append(task.label_of(item, rng, config))
        careful.append(full)
        sloppy.append(int(task.feedback(item, rng, config, careful=False).split()[-1]))
        direct.append(sum(dict(item.rubric).get(feature, 0) for _, feature in item.lines))
    agreement = [np.corrcoef(labels, x)[0, 1] for x in (careful, sloppy, direct)]
    assert agreement[0] > 0.8 and agreement[1] < 0.6 and agreement[2] < 0.75


def test_files_are_reproducible_and_share_no_prompt(tmp_path):
    sizes = {"train": 60, "valid": 20, "test": 30, "sft": 100}

    def written(name: str, seed: int) -> dict[str, list[dict]]:
        write_files(tmp_path / name, task.Rubric(), seed=seed, sizes=sizes, careful_share=0.5)
        files = {path.stem: path.read_text().splitlines() for path in (tmp_path / name).glob("*.jsonl")}
        return {stem: [json.loads(line) for line in lines] for stem, lines in files.items()}

    first = written("a", 0)
    assert {name: len(rows) for name, rows in first.items()} == sizes
    assert first == written("b", 0)
    assert first != written("c", 1)
    prompts = [row["prompt"] for rows in first.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert {row["label"] for row in first["train"]} == {1, 2, 3, 4, 5}
    assert {row["response"].split()[-1] for row in first["sft"]} == set("12345")
    assert set(first["sft"][0]) == {"prompt", "response"}
    written_words = make_model.read_words(tmp_path / "a" / "words.txt")
    assert written_words == task.vocabulary()
    texts = [row["prompt"] + " " + row.get("response", "") for rows in first.values() for row in rows]
    assert {word for text in texts for word in text.split()} <= set(written_words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb c\n", "line 2: 'b c' is not one word"),
        ("a\n\nb\n", "line 2: '' is not one word"),
        ("a\nb\na\n", "line 3: 'a' is in line 1 already"),
        ("</s>\n", "line 1: </s> is the tokenizer's own"),
        ("", "the file is empty"),
        (None, "there is no such file"),
    ],
)
def test_words_that_cannot_be_tokens_are_refused(tmp_path, text, message):
    path = tmp_path / "words.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"--words {path}") + ".*" + re.escape(message)):
        make_model.read_words(path)


def test_the_model_is_made_of_the_words_file(tmp_path):
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    script = [sys.executable, str(FOLDER / "make_model.py"), "--output_dir", str(tmp_path / "init"), "--layers", "1"]
    subprocess.run([*script, "--words", str(tmp_path / "words.txt")], check=True, capture_output=True)
    # Padding, end and unknown come first.
    vocabulary = json.loads((tmp_path / "init/tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary == {"<pad>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4}
    assert json.loads((tmp_path / "init/config.json").read_text())["vocab_size"] == 5
    failed = subprocess.run([*script, "--words", str(tmp_path / "none.txt")], capture_output=True, text=True)
    assert failed.returncode == 2 and "none.txt: there is no such file" in failed.stderr


@pytest.mark.parametrize("kwargs", [{"min_lines": 2}, {"max_lines": 9}, {"min_lines": 6, "max_lines": 5}])
def test_impossible_sizes_are_refused(kwargs):
    with pytest.raises(ValueError, match="min_lines"):
        task.TaskConfig(**kwargs)


def test_the_tokenizer_knows_every_word_and_the_score_is_found():
    tokenizer = make_model.make_tokenizer(task.vocabulary())
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    rng, config = random.Random(0), task.TaskConfig()
    bound = bind_scale(ScoreScale.parse("1-5"), tokenizer, [task.ANCHOR])
    reader = ScoreReader.build(bound, tokenizer, [tokenizer.eos_token_id])
    for index in range(500):
        item = task.draw_item(rng, config)
        feedback = task.feedback(item, rng, config, careful=index % 2 == 0)
        text = f"{feedback} {task.ANCHOR}{task.label_of(item, rng, config)}"
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in tokenizer.encode(item.prompt) + ids
        assert tokenizer.decode(ids) == text
        reading = reader.read([*ids, tokenizer.eos_token_id])
        assert reading.position == len(ids) - 1
        assert task.LABELS[reading.label_index] == text[-1]


def test_the_model_suits_the_engine_and_its_seed():
    tokenizer = make_model.make_tokenizer(task.vocabulary())
    first, second = (make_model.make_model(tokenizer, seed=3, layers=1, hidden=64) for _ in range(2))
    assert first.config.head_dim == 32 and first.config.vocab_size == len(tokenizer)
    assert first.config.eos_token_id == tokenizer.eos_token_id != first.config.pad_token_id
    assert all(bool((a == b).all()) for a, b in zip(first.parameters(), second.parameters()))


def rows_of(predictions: list, labels: list[float], benchmark: str = "test") -> list[dict]:
    return [
        {
            "benchmark": benchmark,
            "row": i,
            "label": y,
            "expected": p,
            "decoded": p,
            "reward": -9.0 if p is None else -((p - y) ** 2),
            "text": f"text {i} of {p}",
        }
        for i, (p, y) in enumerate(zip(predictions, labels))
    ]


def test_the_report_pairs_rows_and_shows_the_difference(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 6, 300).astype(float)
    start, final = labels + rng.normal(0, 2.0, 300), labels + rng.normal(0, 0.5, 300)
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    before = rows_of([2.5, None, *start[2:].tolist()], labels.tolist())
    # Another order in a later file, another benchmark beside it, and numbers that do not sort as text.
    after = [*rows_of(final.tolist(), labels.tolist())[::-1], *rows_of([1.0], [2.0], "valid")]
    worse = rows_of((labels * 0 + 3 + rng.normal(0, 1, 300)).tolist(), labels.tolist())
    for step, rows in ((2, before), (10, after), (20, worse)):
        (run / "eval" / f"step_{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "warnings.jsonl").write_text(json.dumps({"step": 20, "watch": "evaluation", "message": "worse"}) + "\n")
    (run / "model").mkdir()
    JudgeSettings(scale=ScoreScale.parse("1-5"), anchors=("score ",), end_ids=(1,), step=10).save(run / "model")
    prompts = tmp_path / "test.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(300)))
    argv = ["--run", str(run), "--prompts", str(prompts), "--output_dir", str(tmp_path / "out"), "--n_resamples", "200"]

    assert report.main(argv) == 0

    text = (tmp_path / "out" / "report.md").read_text()
    # It opens with one judgement, whose file lists rows in another order.
    assert text.startswith("# One judgement, before and after\n\n    prompt: prompt 0\n")
    assert "start:  text 0 of 2.5    E[score] 2.50" in text and f"after:  text 0 of {final[0]}" in text
    line = next(line for line in text.splitlines() if line.startswith("| pearson | E[score]"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
    known = [i for i in range(300) if i != 1]
    expected = [np.corrcoef(x[known], labels[known])[0, 1] for x in (np.array([2.5, *start[1:]]), final)]
    assert [float(cell) for cell in cells[:3]] == pytest.approx([*expected, expected[1] - expected[0]], abs=1e-3)
    low, high = json.loads(cells[3].replace("+", ""))
    assert 0 < low < expected[1] - expected[0] < high
    rewards = [np.mean([row["reward"] for row in rows]) for rows in (before, after[:300])]
    line = next(line for line in text.splitlines() if line.startswith("| mean reward"))
    assert f"| {rewards[0]:.3f} | {rewards[1]:.3f} |" in line
    assert "| without a score | E[score] | 1 | 0 |" in text
    assert "step 2 against step 10, the exported judge" in text and "- step 20, evaluation: worse" in text
    assert (tmp_path / "out" / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    judged = report.evaluations(run, "test")
    points = report.curve(judged, "reward", seed=0, n_resamples=200)
    assert [step for step, _ in points] == [2, 10, 20] and points[1][1].estimate == pytest.approx(rewards[1])
    assert report.main([*argv, "--benchmark", "tests"]) == 2
    assert "--benchmark tests: the run evaluated test, valid" in capsys.readouterr().err


def test_predictions_of_different_data_are_refused():
    rows = rows_of([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(report.ReportError, match="same rows"):
        report.pair(rows, rows[:1], "expected")
    with pytest.raises(report.ReportError, match="labels"):
        report.pair(rows, rows_of([1.0, 2.0], [1.0, 3.0]), "expected")
    with pytest.raises(report.ReportError, match="same rows"):
        report.pair(rows, rows + rows[:1], "expected")
