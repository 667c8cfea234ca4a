"""The fact check's task: labels worked out from the prompts' own words, its annotators, files and vocabulary."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from examples.quickstart.task_files import write_files
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(folder: str, name: str) -> ModuleType:
    """By path: other examples have modules of the same names."""
    spec = importlib.util.spec_from_file_location(f"facts_{name}", EXAMPLES / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


task, make_model = load("facts", "task"), load("quickstart", "make_model")

ITEM = task.Item(
    facts=(("city", "paris"), ("year", "y3"), ("colour", "red"), ("animal", "cat"), ("metal", "tin"), ("month", "may")),
    parts=(("colour", "blue"), ("city", "paris"), None, ("year", "y3"), ("month", "july"), ("fruit", "fig")),
)
CAREFUL = (
    "colour red wrong -1 city paris right +0 contrary +0 year y3 wrong -1 month may right +0 fruit none unknown +0"
)
FOLDER = Path(__file__).parents[3] / "examples/facts"
SIZES = {"train": 400, "valid": 40, "test": 60, "sft": 400}


def counted(prompt: str) -> int:
    """Right minus wrong claims, by hand from the words."""
    words = prompt.split()
    at = words.index("answer")
    assert words[0] == "reference" and words[-1] == "judge"
    reference = " ".join(words[1:at])
    count, sign, rest = 0, 1, words[at + 1 : -1]
    while rest:
        if rest[0] == "contrary":
            sign, rest = -sign, rest[1:]
            continue
        key, value = rest[:2]
        rest = rest[2:]
        if key in words[1:at]:
            count += sign if f"{key} {value}" in reference else -sign
    return count


def written(folder: Path, seed: int, judge: object = None, careful_share: float = 0.3) -> dict[str, list[dict]]:
    write_files(folder, judge or task.Facts(), seed=seed, sizes=SIZES, careful_share=careful_share)
    files = {path.stem: path.read_text().splitlines() for path in folder.glob("*.jsonl")}
    return {stem: [json.loads(line) for line in lines] for stem, lines in files.items()}


def test_the_turn_turns_what_follows():
    assert task.verdicts(ITEM, range(6)) == ["wrong", "right", None, "wrong", "right", "unknown"]
    # Whoever jumps over the turn reads the later claims the other way round.
    assert task.verdicts(ITEM, [1, 3, 4]) == ["right", "right", "wrong"]


def test_prompt_and_careful_feedback_read_as_documented():
    config = task.TaskConfig(noise=0.0, slope=1.0, center=2.0)
    assert ITEM.prompt == (
        "reference city paris year y3 colour red animal cat metal tin month may "
        "answer colour blue city paris contrary year y3 month july fruit fig judge"
    )
    assert task.feedback(ITEM, random.Random(0), config, careful=True) == CAREFUL
    assert task.label_of(ITEM, random.Random(0), config) == 2


def test_labels_are_those_of_the_prompts_own_words(tmp_path):
    files = written(tmp_path, 5, task.Facts(task.TaskConfig(noise=0.0)), careful_share=1.0)
    counts = {name: [counted(row["prompt"]) for row in rows] for name, rows in files.items()}
    assert min(counts["train"]) <= -4 and max(counts["train"]) >= 4
    for name in ("train", "valid", "test"):
        # A half goes to the even neighbour, as in Python.
        assert [row["label"] for row in files[name]] == [min(5, max(0, round(2.5 + 0.5 * n))) for n in counts[name]]
    for row, count in zip(files["sft"], counts["sft"]):
        *_, last, anchor, score = row["response"].split()
        assert (int(last), anchor, int(score)) == (count, "score", min(5, max(0, round(2.5 + 0.5 * count))))


def test_noise_is_added_before_rounding():
    """For the middle label 2.5 + 0.5 + N(0, 0.5) = 3 + noise, the share between 2.5 and 3.5 is erf(1 / sqrt 2)."""
    item = replace(ITEM, parts=(("city", "paris"), ("fruit", "fig"), ("river", "nile"), ("shape", "cube")))
    rng = random.Random(0)
    share = np.mean([task.label_of(item, rng, task.TaskConfig(noise=0.5)) == 3 for _ in range(4000)])
    assert share == pytest.approx(0.6827, abs=0.025)


def test_sloppy_feedback_jumps_and_counts_only_what_it_read():
    config, rng, shares = task.TaskConfig(slip_share=0.0), random.Random(1), []
    for _ in range(300):
        words = task.feedback(ITEM, rng, config, careful=False).split()
        visited, count, sign = [], 0, 1
        while words:
            if words[0] == "contrary":
                sign, visited, last, words = -sign, [*visited, "contrary"], words[1], words[2:]
            else:
                key, value, verdict, last = words[:4]
                words = words[4:]
                visited.append(key)
                claimed = dict(part for part in ITEM.parts if part is not None)[key]
                assert value == dict(ITEM.facts).get(key, "none")
                expected = 0 if value == "none" else sign if value == claimed else -sign
                assert verdict == {0: "unknown", 1: "right", -1: "wrong"}[expected]
                count += expected
            assert int(last) == count
        order = ["contrary" if part is None else part[0] for part in ITEM.parts]
        assert visited == sorted(visited, key=order.index) and len(set(visited)) == len(visited) > 0
        shares.append(len(visited) / len(order))
    # Steps of 1, 2 and 3 with 0.35, 0.40 and 0.25 are 1.9 on average.
    assert np.mean(shares) == pytest.approx(1 / 1.9, abs=0.05)


def test_slips_turn_verdicts_and_their_counts():
    config = task.TaskConfig(slip_share=1.0, jumps=(1.0,))
    found = task.feedback(ITEM, random.Random(1), config, careful=False)
    assert found == (
        "colour red right +1 city paris wrong +0 contrary +0 year y3 right +1 month may wrong +0 fruit none unknown +0"
    )


def test_the_label_is_worth_reasoning_for():
    """Careful counts agree with labels much better than sloppy ones, or than counts without turns or lookups."""
    config, rng = task.TaskConfig(), random.Random(0)
    rows = []
    for _ in range(6000):
        item = task.draw_item(rng, config)
        facts = dict(item.facts)
        claims = [part for part in item.parts if part is not None]
        no_turns = sum(1 if facts[key] == value else -1 for key, value in claims if key in facts)
        known = sum(key in facts for key, _ in claims)
        label = task.label_of(item, rng, config)
        sloppy = int(task.feedback(item, rng, config, careful=False).split()[-1])
        rows.append([label, counted(item.prompt), sloppy, no_turns, known])
    careful, sloppy, no_turns, known = np.corrcoef(np.array(rows).T)[0, 1:]
    assert careful > 0.85 and sloppy < 0.5 and no_turns < 0.65 and abs(known) < 0.1


def test_files_are_reproducible_and_share_no_prompt(tmp_path):
    first = written(tmp_path / "a", 0)
    assert {name: len(rows) for name, rows in first.items()} == SIZES
    assert first == written(tmp_path / "b", 0)
    assert first != written(tmp_path / "c", 1)
    prompts = [row["prompt"] for rows in first.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert {row["label"] for row in first["train"]} == {0, 1, 2, 3, 4, 5}
    assert {row["response"].split()[-1] for row in first["sft"]} == set("012345")
    assert set(first["sft"][0]) == {"prompt", "response"}
    assert (tmp_path / "a" / "words.txt").read_text().split("\n") == [*task.vocabulary(), ""]


def test_every_word_is_a_token_and_all_texts_are_short(tmp_path):
    files = written(tmp_path, 0, careful_share=1.0)  # careful feedback is the longest
    tokenizer = make_model.make_tokenizer(make_model.read_words(tmp_path / "words.txt"))
    bound = bind_scale(ScoreScale.parse("0-5"), tokenizer, [task.ANCHOR])
    reader = ScoreReader.build(bound, tokenizer, [tokenizer.eos_token_id])
    for row in [row for rows in files.values() for row in rows]:
        prompt, response = tokenizer.encode(row["prompt"]), tokenizer.encode(row.get("response", ""))
        assert len(prompt) == len(row["prompt"].split()) <= 30 and len(response) + 1 <= 31
        assert tokenizer.unk_token_id not in prompt + response
        if response:
            assert tokenizer.decode(response) == row["response"]
            reading = reader.read([*response, tokenizer.eos_token_id])
            assert reading.position == len(response) - 1
            assert task.LABELS[reading.label_index] == row["response"][-1]


def test_the_vocabulary_has_every_word_once():
    words = task.vocabulary()
    assert len(set(words)) == len(words) and all(word.split() == [word] for word in words)


@pytest.mark.parametrize("kwargs", [{"min_parts": 2}, {"max_parts": 8}, {"min_parts": 6, "max_parts": 5}])
def test_impossible_sizes_are_refused(kwargs):
    with pytest.raises(ValueError, match="min_parts"):
        task.TaskConfig(**kwargs)


@pytest.mark.parametrize("name", ["feedback", "direct"])
def test_the_numbers_of_readme_are_those_of_the_json(name):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = json.loads((FOLDER / f"results/{name}.json").read_text(encoding="utf-8"))
    pearson = found["benchmarks"]["test"]["scores"]["expected"]["pearson"]
    line = next(line for line in readme.splitlines() if f"results/{name}.json" in line)
    assert f"{pearson['estimate']:.3f} [{pearson['low']:.3f}, {pearson['high']:.3f}]" in line
