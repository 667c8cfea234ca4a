"""The synthetic judging task of the quickstart: a rubric, an answer, and the score it deserves.

A prompt lists four (feature, weight) pairs and an answer of tagged lines, one feature each:

    rubric slang -2 detail +1 rhyme +2 quotes -1 answer L07 rhyme L08 irony L09 detail L10 humour judge

Feedback walks through the lines with a running tally. "irony" flips the sign of all that follows
it, so the tally cannot be summed at a glance and the reasoning matters:

    L07 rhyme +2 L08 irony +2 L09 detail +1 L10 humour +1 score 3

The label is the clipped, rounded, noisy tally. The warm-up data pair such labels with feedback of two
kinds of annotators: a careful one reads every line, sloppy ones skip lines and make mistakes in a few tallies.
So better feedback exists than most of the warm-up data shows, and RL can find it.

    python examples/quickstart/task.py --output_dir runs/quickstart/data --seed 0

writes train.jsonl, valid.jsonl and test.jsonl (prompt, label), sft.jsonl (prompt, response) and words.txt
(the vocabulary, one word a line). No prompt of one file occurs in another.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.quickstart.task_files import command_line, jumping

FEATURES = ("detail", "humour", "warmth", "brevity", "jargon", "quotes", "rhyme", "slang")
FLIP = "irony"
TAGS = tuple(f"L{i:02d}" for i in range(1, 17))
WORDS = ("rubric", "answer", "judge", "score")
LABELS = ("1", "2", "3", "4", "5")
ANCHOR = "score "
WEIGHTS = (1, 2)
MAX_LINES = 8


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """
    min_lines, max_lines   lines of an answer
    rubric_share           probability that a line shows a feature of the rubric
    flip_share             probability that a line is the flip instead
    center, slope, noise   label = clip(round(center + slope * tally + N(0, noise)), 1, 5)
    jumps                  probabilities that a sloppy annotator moves on by 1, 2, 3, ... lines
    slip_share             probability that a sloppy annotator's tally is off by one
    """

    min_lines: int = 4
    max_lines: int = 6
    rubric_share: float = 0.6
    flip_share: float = 0.1
    center: float = 3.0
    slope: float = 0.5
    noise: float = 0.6
    jumps: tuple[float, ...] = (0.35, 0.40, 0.25)
    slip_share: float = 0.05

    def __post_init__(self) -> None:
        if not len(self.jumps) <= self.min_lines <= self.max_lines <= MAX_LINES:
            # With fewer lines than the longest jump an annotator could read nothing at all.
            raise ValueError(
                f"{len(self.jumps)} jumps <= min_lines <= max_lines <= {MAX_LINES} must hold, got min_lines "
                f"{self.min_lines} and max_lines {self.max_lines}"
            )


@dataclass(frozen=True)
class Item:
    """One prompt: rubric {feature: weight}, and the answer's lines as (tag, feature)."""

    rubric: tuple[tuple[str, int], ...]
    lines: tuple[tuple[str, str], ...]

    @property
    def prompt(self) -> str:
        rubric = " ".join(f"{feature} {weight:+d}" for feature, weight in self.rubric)
        lines = " ".join(f"{tag} {feature}" for tag, feature in self.lines)
        return f"rubric {rubric} answer {lines} judge"


def tallies(item: Item, visited: Sequence[int]) -> list[int]:
    """The running tally after each visited line (indices into item.lines, ascending)."""
    weights, sign, total, out = dict(item.rubric), 1, 0, []
    for index in visited:
        feature = item.lines[index][1]
        if feature == FLIP:
            sign = -sign
        total += sign * weights.get(feature, 0)
        out.append(total)
    return out


def draw_item(rng: random.Random, config: TaskConfig) -> Item:
    features = rng.sample(FEATURES, 4)
    signs = [1, 1, -1, -1]
    rng.shuffle(signs)
    rubric = tuple((feature, sign * rng.choice(WEIGHTS)) for feature, sign in zip(features, signs))
    others = [feature for feature in FEATURES if feature not in features]
    n_lines = rng.randint(config.min_lines, config.max_lines)
    start = rng.randint(0, len(TAGS) - n_lines)
    lines = []
    for tag in TAGS[start : start + n_lines]:
        feature = rng.choice(features if rng.random() < config.rubric_share else others)
        lines.append((tag, FLIP if rng.random() < config.flip_share else feature))
    return Item(rubric, tuple(lines))


def score_of(tally: int, rng: random.Random, config: TaskConfig) -> int:
    raw = config.center + config.slope * tally + rng.gauss(0.0, config.noise)
    return min(len(LABELS), max(1, round(raw)))


def label_of(item: Item, rng: random.Random, config: TaskConfig) -> int:
    return score_of(tallies(item, range(len(item.lines)))[-1], rng, config)


def feedback(item: Item, rng: random.Random, config: TaskConfig, *, careful: bool) -> str:
    """What one annotator writes about the lines, without a score."""
    n = len(item.lines)
    visited = list(range(n)) if careful else jumping(n, config.jumps, rng)
    slip, parts = 0, []
    for index, tally in zip(visited, tallies(item, visited)):
        if not careful and rng.random() < config.slip_share:
            slip += rng.choice((-1, 1))
        tag, feature = item.lines[index]
        parts.append(f"{tag} {feature} {tally + slip:+d}")
    return " ".join(parts)


def vocabulary() -> list[str]:
    """Every word of the task, in a fixed order."""
    reach = (max(WEIGHTS) + 1) * MAX_LINES  # a weight and a slip in every line
    return [*LABELS, *WORDS, *FEATURES, FLIP, *TAGS, *(f"{i:+d}" for i in range(-reach, reach + 1))]


@dataclass(frozen=True)
class Rubric:
    """The task as task_files.Task."""

    config: TaskConfig = TaskConfig()
    anchor: str = ANCHOR

    def draw(self, rng: random.Random) -> Item:
        return draw_item(rng, self.config)

    def label(self, item: Item, rng: random.Random) -> int:
        return label_of(item, rng, self.config)

    def feedback(self, item: Item, rng: random.Random, *, careful: bool) -> str:
        return feedback(item, rng, self.config, careful=careful)

    def words(self) -> list[str]:
        return vocabulary()


if __name__ == "__main__":
    command_line(Rubric(), "Write the quickstart's data.")
