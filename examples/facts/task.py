"""A synthetic fact check: a reference, an answer with claims, and the score it deserves.

A prompt lists six (key, value) facts and an answer of claims in another order:

    reference city paris year y3 colour red animal cat metal tin month may
    answer colour blue city paris contrary year y3 fruit fig judge

Feedback walks through the claims. It looks every key up in the reference, and counts right minus wrong claims:

    colour red wrong -1 city paris right +0 contrary +0 year y3 wrong -1 fruit none unknown -1 score 2

"contrary" reverses the claims after it: from there on a claim is right when the reference says something else. It
occurs once or not at all. A key that the reference does not have does not count.

The label is the clipped, rounded, noisy count, from 0 to 5. The warm-up data pair such labels with feedback of two
kinds of annotators: a careful one checks every claim, sloppy ones skip claims and get a few verdicts wrong.
So better feedback exists than most of the warm-up data shows, and RL can find it.

    python examples/facts/task.py --output_dir runs/facts/data --seed 0

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

VALUES = {
    "city": ("paris", "rome", "oslo"),
    "year": ("y1", "y2", "y3"),
    "colour": ("red", "blue", "green"),
    "animal": ("cat", "dog", "owl"),
    "metal": ("tin", "iron", "gold"),
    "month": ("may", "june", "july"),
    "fruit": ("fig", "pear", "plum"),
    "sport": ("golf", "chess", "judo"),
}
TURN = "contrary"
RIGHT, WRONG, UNKNOWN, NONE = "right", "wrong", "unknown", "none"
WORDS = ("reference", "answer", "judge", "score", RIGHT, WRONG, UNKNOWN, NONE)
LABELS = ("0", "1", "2", "3", "4", "5")
ANCHOR = "score "
N_FACTS = 6
MAX_PARTS = 7


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """
    min_parts, max_parts   parts of an answer: claims, and the turn if there is one
    turn_share             probability that an answer has a turn, in any place but the last
    known_share            probability that a claim is about a key of the reference
    right_share            probability that such a claim states the reference's value
    center, slope, noise   label = clip(round(center + slope * (right - wrong) + N(0, noise)), 0, 5)
    jumps                  probabilities that a sloppy annotator moves on by 1, 2, 3, ... parts
    slip_share             probability that a sloppy annotator takes right for wrong, or wrong for right
    """

    min_parts: int = 4
    max_parts: int = 7
    turn_share: float = 0.4
    known_share: float = 0.85
    right_share: float = 0.5
    center: float = 2.5
    slope: float = 0.5
    noise: float = 0.5
    jumps: tuple[float, ...] = (0.35, 0.40, 0.25)
    slip_share: float = 0.05

    def __post_init__(self) -> None:
        if not len(self.jumps) <= self.min_parts <= self.max_parts <= MAX_PARTS:
            # With fewer parts than the longest jump an annotator could read nothing at all.
            raise ValueError(
                f"{len(self.jumps)} jumps <= min_parts <= max_parts <= {MAX_PARTS} must hold, got min_parts "
                f"{self.min_parts} and max_parts {self.max_parts}"
            )


@dataclass(frozen=True)
class Item:
    """One prompt. facts: (key, value) of the reference; parts: (key, claimed value), or None for a turn."""

    facts: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str] | None, ...]

    @property
    def prompt(self) -> str:
        facts = " ".join(f"{key} {value}" for key, value in self.facts)
        parts = " ".join(TURN if part is None else " ".join(part) for part in self.parts)
        return f"reference {facts} answer {parts} judge"


def verdicts(item: Item, visited: Sequence[int]) -> list[str | None]:
    """Right, wrong or unknown for each visited part (indices into item.parts, ascending); None for a turn."""
    facts, turned = dict(item.facts), False
    out: list[str | None] = []
    for index in visited:
        part = item.parts[index]
        if part is None:
            turned = True
            out.append(None)
        elif part[0] not in facts:
            out.append(UNKNOWN)
        else:
            out.append(RIGHT if (facts[part[0]] == part[1]) != turned else WRONG)
    return out


def draw_item(rng: random.Random, config: TaskConfig) -> Item:
    keys = rng.sample(sorted(VALUES), len(VALUES))
    facts = {key: rng.choice(VALUES[key]) for key in keys[:N_FACTS]}
    known, others = rng.sample(keys[:N_FACTS], N_FACTS), keys[N_FACTS:]
    parts: list[tuple[str, str] | None] = []
    n_parts = rng.randint(config.min_parts, config.max_parts)
    turn = rng.randrange(n_parts - 1) if rng.random() < config.turn_share else None
    for place in range(n_parts):
        if place == turn:
            parts.append(None)
            continue
        # No key is claimed twice, so one list may run out.
        from_known = bool(known) and (not others or rng.random() < config.known_share)
        key = (known if from_known else others).pop()
        if from_known and rng.random() < config.right_share:
            parts.append((key, facts[key]))
        else:
            parts.append((key, rng.choice([value for value in VALUES[key] if value != facts.get(key)])))
    return Item(tuple(facts.items()), tuple(parts))


def label_of(item: Item, rng: random.Random, config: TaskConfig) -> int:
    found = verdicts(item, range(len(item.parts)))
    raw = config.center + config.slope * (found.count(RIGHT) - found.count(WRONG)) + rng.gauss(0.0, config.noise)
    return min(len(LABELS) - 1, max(0, round(raw)))


def feedback(item: Item, rng: random.Random, config: TaskConfig, *, careful: bool) -> str:
    """What one annotator writes about the parts, without a score."""
    n = len(item.parts)
    visited = list(range(n)) if careful else jumping(n, config.jumps, rng)
    facts, count, out = dict(item.facts), 0, []
    for index, verdict in zip(visited, verdicts(item, visited)):
        part = item.parts[index]
        if part is None:
            out.append(f"{TURN} {count:+d}")
            continue
        if verdict != UNKNOWN:
            if not careful and rng.random() < config.slip_share:
                verdict = WRONG if verdict == RIGHT else RIGHT
            count += 1 if verdict == RIGHT else -1
        out.append(f"{part[0]} {facts.get(part[0], NONE)} {verdict} {count:+d}")
    return " ".join(out)


def vocabulary() -> list[str]:
    """Every word of the task, in a fixed order."""
    values = [value for group in VALUES.values() for value in group]
    return [*LABELS, *WORDS, TURN, *VALUES, *values, *(f"{i:+d}" for i in range(-MAX_PARTS, MAX_PARTS + 1))]


@dataclass(frozen=True)
class Facts:
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
    command_line(Facts(), "Write the data of the fact check.")
