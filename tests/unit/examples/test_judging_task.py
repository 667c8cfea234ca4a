"""The judging task: labels by hand, raters' noise against scipy, annotators, and what each file may hold."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from examples.judging_task import items, task
from examples.judging_task.annotators import ANCHOR, CAREFUL, MAX_TALLY, SLOPPY, Annotator, feedback
from examples.judging_task.items import CRITERIA, FILLERS, FLIP, FLIP_SYNONYM, SYNONYMS, TAGS, Item, TaskConfig, Writer
from examples.quickstart.make_model import make_tokenizer, read_words
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale

ROWS = {name: 300 for name in task.SPLITS}
ITEM = Item(
    rubric=(("sources", 2), ("slang", -2), ("examples", 1), ("hedging", -1)),
    shown=("examples", "flattery", FLIP, "slang", "hedging", FLIP, "slang"),
    tags=("L03", "L04", "L05", "L06", "L07", "L08", "L09"),
    written=("instances", "flattery", "so irony", "slang", "doubts", "irony", "lingo"),
    writer="by hand",
)


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return task.make_splits(0, ROWS, TaskConfig())


def counted(prompt: str) -> tuple[int, tuple[str, ...]]:
    """The tally and the lines' meaning, from the prompt's words and the table of synonyms alone."""
    head, _, body = prompt.removeprefix("rubric ").removesuffix(" judge").partition(" response ")
    words = head.split()
    weights = dict(zip(words[::2], map(int, words[1::2])))
    meaning = {other: word for word, other in SYNONYMS.items()} | {FLIP_SYNONYM: FLIP}
    shown = [word for word in body.split() if word not in TAGS and word not in FILLERS]
    shown = [meaning.get(word, word) for word in shown]
    # Every irony before a line turns it once more.
    tally = sum(weights.get(word, 0) * (-1) ** shown[:i].count(FLIP) for i, word in enumerate(shown))
    return tally, tuple(shown)


# -- labels --------------------------------------------------------------------------------------------


def test_irony_turns_the_sign_of_what_follows():
    # +1 examples, 0, irony, slang -2 turned, hedging -1 turned, irony, slang -2.
    assert items.tallies(ITEM, range(7)) == [1, 1, 1, 3, 4, 4, 2]
    assert items.tally_of(ITEM) == 2
    # Whoever jumps over both ironies adds other numbers.
    assert items.tallies(ITEM, [0, 3, 4]) == [1, -1, -2]


def test_a_prompt_reads_as_documented():
    assert ITEM.prompt == (
        "rubric sources +2 slang -2 examples +1 hedging -1 response "
        "L03 instances L04 flattery L05 so irony L06 slang L07 doubts L08 irony L09 lingo judge"
    )
    assert counted(ITEM.prompt) == (2, ITEM.shown)


class Fixed(random.Random):
    """Rater's noise of a known size."""

    def __init__(self, noise: float) -> None:
        super().__init__(0)
        self.noise = noise

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return mu + self.noise * sigma


@pytest.mark.parametrize(
    ("tally", "noise", "label"),
    # 3 + 0.4 tally + 0.8 noise, rounded, then cut: 3.8, 3.8 - 0.8 = 3.0, 3.8 + 1.6 = 5.4, 7.0, -1.4.
    [(2, 0.0, 4), (2, -1.0, 3), (2, 2.0, 5), (10, 0.0, 5), (-11, 0.0, 1), (-1, 0.0, 3), (-2, 0.0, 2)],
)
def test_a_label_is_the_noisy_tally_rounded_and_cut(tally, noise, label):
    assert items.draw_label(tally, Fixed(noise), TaskConfig()) == label


@pytest.mark.parametrize("tally", [-9, -2, 0, 1, 5])
def test_the_true_score_is_the_mean_of_all_raters(tally):
    config = TaskConfig()
    seen = stats.norm(3.0 + 0.4 * tally, 0.8)
    edges = [-np.inf, 1.5, 2.5, 3.5, 4.5, np.inf]
    by_label = [(seen.cdf(high) - seen.cdf(low)) * label for label, low, high in zip(range(1, 6), edges, edges[1:])]
    assert items.true_score(tally, config) == pytest.approx(sum(by_label), abs=1e-12)
    rng = random.Random(1)
    drawn = [items.draw_label(tally, rng, config) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(items.true_score(tally, config), abs=4 * 0.8 / 4000**0.5)


def test_rows_agree_with_what_the_prompt_says(files):
    for row in [row for rows in files.values() for row in rows]:
        tally, shown = counted(row["prompt"])
        assert (row["tally"], row["flips"]) == (tally, shown.count(FLIP))
        assert row["true_score"] == pytest.approx(items.true_score(tally, TaskConfig()), abs=1e-4)
        assert row["label"] in (1, 2, 3, 4, 5)
        rubric = [f"{CRITERIA[i]} {weight:+d}" for i, weight in zip(row["criteria"], row["weights"])]
        assert row["prompt"].startswith(f"rubric {' '.join(rubric)} response {row['tags'][0]} ")
        assert row["plain_sum"] == sum(dict(zip(row["criteria"], row["weights"])).get(i, 0) for i in indices(shown))
        assert sorted(np.sign(row["weights"])) == [-1, -1, 1, 1]
        # The last tally of careful feedback is the whole one.
        assert int(row["careful_feedback"].split()[-1]) == tally


def indices(shown: tuple[str, ...]) -> list[int]:
    return [CRITERIA.index(word) for word in shown if word != FLIP]


def test_ceilings_leave_room_for_noise_and_reward_reasoning():
    """No judge can agree better than the true score; sums that ignore the irony agree much less."""
    files = task.make_splits(
        0, {name: 2000 if name in (*task.TESTS, "valid") else 1 for name in task.SPLITS}, TaskConfig()
    )
    for name in (*task.TESTS, "valid"):
        labels = [row["label"] for row in files[name]]
        ceiling = stats.pearsonr([row["true_score"] for row in files[name]], labels).statistic
        plain = stats.pearsonr([row["plain_sum"] for row in files[name]], labels).statistic
        assert 0.75 < ceiling < 0.9 and plain < 0.6, name


# -- annotators ----------------------------------------------------------------------------------------


def test_careful_feedback_reads_every_line_in_the_rubrics_words():
    assert feedback(ITEM, CAREFUL, random.Random(0)) == (
        "L03 examples +1 L04 flattery +1 L05 irony +1 L06 slang +3 L07 hedging +4 L08 irony +4 L09 slang +2"
    )


def test_sloppy_feedback_jumps_lines_and_tallies_only_what_it_read():
    rng, shares = random.Random(1), []
    annotator = Annotator(name="sloppy without slips", jumps=SLOPPY.jumps)
    for _ in range(400):
        words = feedback(ITEM, annotator, rng).split()
        visited = [ITEM.tags.index(tag) for tag in words[::3]]
        assert visited == sorted(set(visited)) and [ITEM.shown[i] for i in visited] == words[1::3]
        assert [int(word) for word in words[2::3]] == items.tallies(ITEM, visited)
        shares.append(len(visited) / 7)
    # Steps of 1, 2 and 3 with 0.4, 0.5 and 0.1 are 1.7 on average.
    assert np.mean(shares) == pytest.approx(1 / 1.7, abs=0.05)


def test_slips_are_by_one_and_stay():
    words = feedback(ITEM, Annotator(name="slips", slip_share=1.0), random.Random(1)).split()
    errors = np.array([int(word) for word in words[2::3]]) - items.tallies(ITEM, range(7))
    assert set(np.abs(np.diff([0, *errors]))) == {1}


def test_stage_1_is_careful_and_the_rest_mostly_sloppy():
    files = task.make_splits(3, {**{name: 1 for name in task.SPLITS}, "sft": 4000, "sft_careful": 4000}, TaskConfig())
    assert {row["annotator"] for row in files["sft_careful"]} == {"careful"}
    assert np.mean([row["annotator"] == "careful" for row in files["sft"]]) == pytest.approx(0.1, abs=0.02)
    for row in files["sft_careful"]:
        assert row["response"] == f"{row['careful_feedback']} score {row['label']}"
    lengths = np.array([len(row["tags"]) for row in files["sft_careful"]])
    assert np.mean(lengths >= 10) == pytest.approx(0.15, abs=0.025) and set(lengths) == {5, 6, 7, 8, 10, 11, 12, 13}
    guests = [row["writer"] for row in files["sft_careful"] if row["writer"] != "house"]
    assert len(guests) / 4000 == pytest.approx(0.15, abs=0.025) and set(guests) == {w.name for w in task.GUESTS}
    # In what comes after stage 1 none of that.
    assert {row["writer"] for row in files["sft"]} == {"house"}
    assert {len(row["tags"]) for row in files["sft"]} == {5, 6, 7, 8}


# -- splits --------------------------------------------------------------------------------------------


def test_files_repeat_and_depend_on_the_seed(files):
    assert task.make_splits(0, ROWS, TaskConfig()) == files
    assert task.make_splits(1, ROWS, TaskConfig()) != files
    assert {name: len(rows) for name, rows in files.items()} == ROWS
    # Other sizes of training files change no test.
    smaller = task.make_splits(0, {**ROWS, "train": 5, "sft": 5, "sft_careful": 5}, TaskConfig())
    assert all(smaller[name] == files[name] for name in (*task.TESTS, "valid"))


def test_every_test_has_a_thousand_rows_and_validation_is_apart():
    assert len(task.TESTS) == 4 and all(task.SPLITS[name].rows >= 1000 for name in (*task.TESTS, "valid"))


def test_no_content_is_in_two_rows(files):
    """By the prompts' own words: neither line numbers, nor synonyms, nor fillers make two rows different."""
    rows = [row for rows in files.values() for row in rows]
    contents = [(row["prompt"].partition(" response ")[0], counted(row["prompt"])[1]) for row in rows]
    assert len(set(contents)) == len(contents)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_taken_contents_are_drawn_again():
    """With a response of one line, and no flip, few contents exist: all are different all the same."""
    split, seen = task.Split(rows=0, lines=(1, 1)), set()
    config = TaskConfig(rubric_share=1.0, flip_share=0.0)
    stream = task.draw_items(split, random.Random(0), config, seen)
    drawn = [next(stream) for _ in range(20000)]
    assert len({item.content for item in drawn}) == 20000 == len(seen)
    free = [items.draw_item(random.Random(i), config, lines=(1, 1)) for i in range(20000)]
    assert len({item.content for item in free}) < 20000


def pairs(rows: list[dict]) -> list[set[frozenset[int]]]:
    return [{frozenset(pair) for pair in combinations(row["criteria"], 2)} for row in rows]


def test_unseen_rubrics_hold_pairs_that_meet_nowhere_else(files):
    known = set().union(*(p for name, rows in files.items() if name != "test_rubrics" for p in pairs(rows)))
    fresh = [found - known for found in pairs(files["test_rubrics"])]
    assert all(len(found) >= 2 for found in fresh)
    # All of the ring's twelve, and no others: what was not seen was never to be seen.
    ring = {frozenset((i, (i + 1) % 12)) for i in range(12)}
    assert set().union(*fresh) == ring and not known & ring and len(known) == 66 - 12
    # Each criterion alone is known.
    assert set().union(*known) == set(range(12))


def test_longer_responses_and_other_writers_differ_in_that_alone(files):
    assert {len(row["tags"]) for row in files["test_longer"]} == {10, 11, 12, 13}
    for name in ("test_id", "test_rubrics", "test_writers", "valid", "train"):
        assert {len(row["tags"]) for row in files[name]} == {5, 6, 7, 8}
    for name in ("test_id", "test_rubrics", "test_longer", "valid", "train"):
        for row in files[name]:
            assert row["tags"] == sorted(row["tags"]) and row["writer"] == "house"
            assert not {*FILLERS, FLIP_SYNONYM, *SYNONYMS.values()} & set(row["prompt"].split())
    words = [row["prompt"].split() for row in files["test_writers"]]
    assert all(row["tags"] == sorted(row["tags"], reverse=True) for row in files["test_writers"])
    lines = sum(len(row["tags"]) for row in files["test_writers"])
    other = {*SYNONYMS.values(), FLIP_SYNONYM}
    assert sum(word in other for row in words for word in row) / lines == pytest.approx(0.8, abs=0.04)
    assert sum(word in FILLERS for row in words for word in row) / lines == pytest.approx(0.3, abs=0.04)


def test_no_guest_of_stage_1_has_two_habits():
    habits = [(writer.synonyms > 0, writer.fillers > 0, writer.downwards) for writer in task.GUESTS]
    assert sorted(habits) == [(False, False, True), (False, True, False), (True, False, False)]
    assert (task.STRANGERS.synonyms > 0, task.STRANGERS.fillers > 0, task.STRANGERS.downwards) == (True, True, True)


# -- files and tokens ----------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    line = [sys.executable, "-m", "examples.judging_task.task", *words]
    return subprocess.run(line, cwd=root, capture_output=True, text=True)


def test_the_command_writes_what_the_functions_make(files, tmp_path):
    sizes = [word for name in task.SPLITS for word in (f"--n_{name}", "300")]
    assert command("--output_dir", str(tmp_path), "--seed", "0", *sizes).returncode == 0
    found = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    assert found == files
    assert read_words(tmp_path / "words.txt") == task.vocabulary()


def test_every_word_is_a_token_and_sequences_are_short(files):
    tokenizer = make_tokenizer(task.vocabulary())
    bound = bind_scale(ScoreScale.parse("1-5"), tokenizer, [ANCHOR])
    reader = ScoreReader.build(bound, tokenizer, [tokenizer.eos_token_id])
    for row in [row for rows in files.values() for row in rows]:
        prompt, response = tokenizer.encode(row["prompt"]), tokenizer.encode(row.get("response", ""))
        careful = tokenizer.encode(row["careful_feedback"])
        assert tokenizer.unk_token_id not in prompt + response + careful
        assert len(prompt) + max(len(response) + 1, len(careful) + 3) <= 80
        if response:
            reading = reader.read([*response, tokenizer.eos_token_id])
            assert reading.position == len(response) - 1 and reading.label_index == row["label"] - 1


def test_the_largest_tally_has_a_word():
    words = task.vocabulary()
    assert len(set(words)) == len(words) and all(word.split() == [word] for word in words)
    assert MAX_TALLY == 3 * 13 and {f"{MAX_TALLY:+d}", f"{-MAX_TALLY:+d}", "+0"} <= set(words)


@pytest.mark.parametrize("text", ["0", "-3", "many", "2.5"])
def test_impossible_sizes_are_refused(text, tmp_path):
    found = command("--output_dir", str(tmp_path), f"--n_train={text}")
    assert found.returncode == 2
    assert f"argument --n_train: '{text}' is no whole number of at least 1" in found.stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    sizes = [word for name in task.SPLITS for word in (f"--n_{name}", "1")]
    found = command("--output_dir", str(tmp_path / "file"), *sizes)
    assert found.returncode == 2 and f"--output_dir {tmp_path / 'file'}" in found.stderr


@pytest.mark.parametrize("kwargs", [{"rubric_share": 1.5}, {"flip_share": -0.1}, {"noise": 0.0}])
def test_impossible_settings_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        TaskConfig(**kwargs)


def test_a_writer_changes_words_and_not_the_meaning():
    plain = items.draw_item(random.Random(5), TaskConfig(), lines=(6, 6))
    odd = Writer(name="odd", synonyms=1.0, fillers=1.0, downwards=True)
    for seed in range(50):
        item = items.draw_item(random.Random(seed), TaskConfig(), lines=(6, 6), writer=odd)
        assert counted(item.prompt) == (items.tally_of(item), item.shown)
        assert list(item.tags) == sorted(item.tags, reverse=True)
        assert all(len(words.split()) == 2 and words.split()[0] in FILLERS for words in item.written)
    assert plain.written == plain.shown
