"""The judging task's measurements: batches against single prompts, summaries by hand, the committed numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from examples.judging_task import check, measure, task, warm_up
from examples.judging_task.items import TaskConfig
from examples.judging_task.measure import Judgement, Measurer
from examples.quickstart.make_model import make_model, make_tokenizer

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples/judging_task"


@pytest.fixture(scope="module")
def measurer(tmp_path_factory) -> Measurer:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(task.vocabulary())
    make_model(tokenizer, seed=0, layers=2, hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Measurer(str(folder), batch_size=3)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    sizes = {name: 7 for name in task.SPLITS}
    files = task.make_splits(0, sizes, TaskConfig())
    # Of different lengths, so that every batch is padded.
    return [row for pair in zip(files["valid"], files["test_longer"]) for row in pair]


def by_hand(measurer: Measurer, prompt: str, response: str) -> tuple[float, float]:
    """E[score] and mass of one text, without batch, padding or reader: the logits that follow the word "score"."""
    words = f"{prompt} {response}".split()
    at = len(words) - 1 - words[::-1].index("score")
    logits = measurer.model(measurer.tokenizer(" ".join(words[: at + 1]), return_tensors="pt")["input_ids"]).logits
    probs = logits[0, -1].double().softmax(-1)
    scores = [float(probs[measurer.tokenizer.convert_tokens_to_ids(str(k))]) for k in (1, 2, 3, 4, 5)]
    return sum(k * p for k, p in zip((1, 2, 3, 4, 5), scores)), sum(scores)


@torch.inference_mode()
def test_readings_of_padded_batches_are_those_of_single_prompts(measurer, rows):
    texts = [f"{row['careful_feedback']} score {row['label']}" for row in rows]
    judged = measurer.read([row["prompt"] for row in rows], [measurer.tokenizer.encode(text) for text in texts])
    for row, text, found in zip(rows, texts, judged):
        expected, mass = by_hand(measurer, row["prompt"], text)
        assert found.expected == pytest.approx(expected, rel=1e-4) and found.mass == pytest.approx(mass, rel=1e-4)
        assert (found.decoded, found.text) == (row["label"], text)


def test_a_reading_does_not_see_the_label(measurer, rows):
    ways = [
        measurer.read([rows[0]["prompt"]], [measurer.tokenizer.encode(f"L03 slang +1 score {label}")])[0].expected
        for label in (1, 5)
    ]
    assert ways[0] == ways[1] is not None


def test_texts_without_a_score_have_none(measurer):
    texts = ["L03 slang +1", "L03 slang score", "L03 slang score judge"]
    judged = measurer.read(["rubric judge"] * 3, [measurer.tokenizer.encode(text) for text in texts])
    assert [j.decoded for j in judged] == [None] * 3
    assert [j.expected is None for j in judged] == [True, True, False]


@torch.inference_mode()
def test_greedy_generation_of_a_padded_batch_is_that_of_single_prompts(measurer, rows):
    prompts = [row["prompt"] for row in rows]
    found = measurer.generate(prompts, sample=False, seed=0)
    for prompt, response in zip(prompts, found):
        ids = measurer.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for token in response:
            assert token == int(measurer.model(ids).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert measurer.end not in response[:-1]
        assert response[-1] == measurer.end or len(response) == measure.MAX_NEW_TOKENS


def test_samples_follow_the_whole_distribution_and_the_seed(measurer, rows):
    prompts = [rows[0]["prompt"]] * 600
    wide = Measurer.__new__(Measurer)
    wide.__dict__.update(measurer.__dict__, batch_size=600)
    first = [ids[0] for ids in wide.generate(prompts, sample=True, seed=1)]
    assert first == [ids[0] for ids in wide.generate(prompts, sample=True, seed=1)]
    assert first != [ids[0] for ids in wide.generate(prompts, sample=True, seed=2)]
    with torch.inference_mode():
        ids = measurer.tokenizer(prompts[0], return_tensors="pt")["input_ids"]
        probs = measurer.model(ids).logits[0, -1].double().softmax(-1)
    # The rare half of the vocabulary, which a cut after 50 tokens would never give.
    rare = set(probs.argsort()[:-50].tolist())
    share = sum(token in rare for token in first) / 600
    expected = float(probs[sorted(rare)].sum())
    assert expected > 0.05 and share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 600) ** 0.5)


def test_a_summary_by_hand():
    tags = ["L01", "L02", "L03", "L04"]
    rows = [{"label": y, "tags": tags, "tally": t} for y, t in ((1, -2), (2, 0), (4, 3), (5, 4))]
    judged = [
        Judgement(text="L01 slang -1 L03 slang -2 score 2", decoded=2.0, expected=1.5, mass=1.0),
        Judgement(text="L01 slang +1 score 1", decoded=1.0, expected=2.5, mass=0.5),
        Judgement(
            text="L01 slang +1 L02 irony +1 L03 slang +3 L04 slang +3 score 4", decoded=4.0, expected=3.0, mass=0.9
        ),
        Judgement(text="L01 slang", decoded=None, expected=None, mass=None),
    ]
    found = measure.summary(rows, judged, seed=0)
    assert found["decoded"]["pearson"] == pytest.approx(stats.pearsonr([2, 1, 4], [1, 2, 4]).statistic)
    assert found["expected"]["pearson"] == pytest.approx(stats.pearsonr([1.5, 2.5, 3.0], [1, 2, 4]).statistic)
    assert found["unscored"] == 0.25 and found["mass"] == pytest.approx(0.8) and found["n"] == 4
    assert found["coverage"] == pytest.approx((0.5 + 0.25 + 1.0 + 0.25) / 4)
    # Right, wrong, right, and no tally at all.
    assert found["tally_right"] == 0.5


@pytest.mark.parametrize(
    ("text", "tally"), [("L01 slang -2 score 3", -2), ("L01 slang +10", 10), ("score 3", None), ("a+1 +2b", None)]
)
def test_the_last_tally_of_a_text(text, tally):
    assert measure.last_tally(text) == tally


def test_rule_facts_by_scipy(tmp_path):
    sizes = {name: 400 if name == "valid" else 1 for name in task.SPLITS}
    rows = task.make_splits(1, sizes, TaskConfig())["valid"]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, labels = check.rule_facts(path), [row["label"] for row in rows]
    for name, column in (("ceiling", "true_score"), ("plain_sum", "plain_sum")):
        assert found[name] == pytest.approx(stats.pearsonr([row[column] for row in rows], labels).statistic)
    assert sum(found["labels"].values()) == pytest.approx(1.0) and found["n"] == 400


def test_score_only_keeps_rows_and_drops_feedback(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    sizes = {name: 20 if name == "sft_careful" else 1 for name in task.SPLITS}
    rows = task.make_splits(0, sizes, TaskConfig())["sft_careful"]
    (tmp_path / "data/sft_careful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = []
    monkeypatch.setattr(warm_up, "run", lambda log, *words: calls.append(words))
    warm_up.make_score_only(tmp_path, 4)
    found = [json.loads(line) for line in (tmp_path / "data/score_only.jsonl").read_text().splitlines()]
    assert found == [{"prompt": row["prompt"], "response": f"score {row['label']}"} for row in rows]
    # Everything that stage 1 gets, but for the file and the folder.
    (tmp_path / "stage_1").mkdir()
    warm_up.train(tmp_path, "stage_1", model="init", data="sft_careful", stage=warm_up.STAGE_1, seed=4)
    differ = [(a, b) for a, b in zip(*calls) if a != b]
    assert [(Path(a).name, Path(b).name) for a, b in differ] == [
        ("score_only.jsonl", "sft_careful.jsonl"),
        ("score_only", "stage_1"),
    ]


def test_a_missing_file_is_named(tmp_path):
    words = ["--model", "none", "--data", str(tmp_path), "--output", str(tmp_path / "out.json")]
    found = subprocess.run(
        [sys.executable, "-m", "examples.judging_task.measure", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 2 and f"--data: there is no {tmp_path}/valid.jsonl" in found.stderr


def test_the_example_of_readme_is_what_the_annotators_write():
    sizes = {name: 2 for name in task.SPLITS}
    row = task.make_splits(0, sizes, TaskConfig())["sft"][1]
    assert (row["label"], row["true_score"], row["annotator"]) == (2, 3.0, "sloppy")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for text in (row["prompt"], row["careful_feedback"], row["response"]):
        assert text in readme


def test_the_tables_of_readme_are_those_of_the_json():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    results = json.loads((FOLDER / "results/start.json").read_text(encoding="utf-8"))
    assert check.table(results) in readme and results["command"] in readme
