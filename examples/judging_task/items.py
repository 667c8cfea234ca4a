"""The synthetic judging task: a rubric, a response, how far the one satisfies the other, and what a rater says.

A prompt names four criteria with their weights, then shows a response line by line. Every line shows one criterion:

    rubric sources +2 slang -2 examples +1 hedging -1 response L03 examples L04 flattery L05 irony L06 slang judge

The tally adds the weights of the lines, and "irony" turns the sign of all that comes after it. Here it is +1, +1, +1,
+3: slang counts -2, and after the irony +2. A rater sees the tally, not quite exactly, and scores from 1 to 5:

    label = clip(round(3 + 0.4 tally + N(0, 0.8)), 1, 5)

So two raters differ, and the best that a judge can do is to write the mean of all raters, the true score.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

# Each with the word that other writers use for it.
SYNONYMS = {
    "sources": "citations",
    "examples": "instances",
    "numbers": "figures",
    "steps": "stages",
    "summary": "recap",
    "warmth": "kindness",
    "humour": "jokes",
    "slang": "lingo",
    "jargon": "buzzwords",
    "echoes": "repeats",
    "flattery": "praise",
    "hedging": "doubts",
}
CRITERIA = tuple(SYNONYMS)
FLIP, FLIP_SYNONYM = "irony", "sarcasm"
FILLERS = ("well", "so", "also", "then")
TAGS = tuple(f"L{i:02d}" for i in range(1, 21))
WEIGHTS = (1, 2)
LABELS = (1, 2, 3, 4, 5)
PER_RUBRIC = 4
MAX_LINES = 13


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """
    rubric_share           probability that a line shows a criterion of the rubric
    flip_share             probability that a line is the flip instead
    center, slope, noise   label = clip(round(center + slope * tally + N(0, noise)), 1, 5)
    """

    rubric_share: float = 0.6
    flip_share: float = 0.1
    center: float = 3.0
    slope: float = 0.4
    noise: float = 0.8

    def __post_init__(self) -> None:
        for name in ("rubric_share", "flip_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability and lies in [0, 1], got {getattr(self, name)}")
        if not self.noise > 0.0:
            raise ValueError(f"noise must be positive, got {self.noise}; without it the true score is the label")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How responses are written. What they mean does not depend on it.

    synonyms   probability that a line uses the other word for what it shows
    fillers    probability that a line opens with a word that means nothing
    downwards  line numbers count down instead of up
    """

    name: str
    synonyms: float = 0.0
    fillers: float = 0.0
    downwards: bool = False


HOUSE = Writer(name="house")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt.

    rubric   (criterion, weight), four of them
    shown    the criterion, or the flip, of each line
    tags     the number of each line
    written  the words of each line, after its tag
    writer   the writer's name
    """

    rubric: tuple[tuple[str, int], ...]
    shown: tuple[str, ...]
    tags: tuple[str, ...]
    written: tuple[str, ...]
    writer: str

    @property
    def prompt(self) -> str:
        rubric = " ".join(f"{criterion} {weight:+d}" for criterion, weight in self.rubric)
        lines = " ".join(f"{tag} {words}" for tag, words in zip(self.tags, self.written))
        return f"rubric {rubric} response {lines} judge"

    @property
    def content(self) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
        """What is judged, without line numbers and choice of words."""
        return self.rubric, self.shown


def tallies(item: Item, visited: Sequence[int]) -> list[int]:
    """The running tally after each visited line (indices into item.shown, ascending)."""
    weights, sign, total, out = dict(item.rubric), 1, 0, []
    for index in visited:
        if item.shown[index] == FLIP:
            sign = -sign
        total += sign * weights.get(item.shown[index], 0)
        out.append(total)
    return out


def tally_of(item: Item) -> int:
    return tallies(item, range(len(item.shown)))[-1]


def draw_label(tally: int, rng: random.Random, config: TaskConfig) -> int:
    """One rater's score."""
    raw = config.center + config.slope * tally + rng.gauss(0.0, config.noise)
    return min(LABELS[-1], max(LABELS[0], round(raw)))


def true_score(tally: int, config: TaskConfig) -> float:
    """The mean of all raters, E[label | tally]: no function of the prompt agrees better with the labels."""
    seen = NormalDist(config.center + config.slope * tally, config.noise)
    # A label of at least k is a raw score above k - 1/2.
    return LABELS[0] + sum(1.0 - seen.cdf(label - 0.5) for label in LABELS[1:])


def neighbours(rubric: Sequence[str]) -> int:
    """How many pairs of a rubric's criteria stand next to each other in the ring of CRITERIA."""
    n = len(CRITERIA)
    places = [CRITERIA.index(criterion) for criterion in rubric]
    return sum((a - b) % n in (1, n - 1) for a, b in combinations(places, 2))


def draw_criteria(rng: random.Random, *, unseen: bool) -> list[str]:
    """Criteria of a rubric. Neighbours in the ring never meet in one; in an unseen rubric at least two pairs do."""
    while True:
        criteria = rng.sample(CRITERIA, PER_RUBRIC)
        if (neighbours(criteria) >= 2) if unseen else (neighbours(criteria) == 0):
            return criteria


def draw_item(
    rng: random.Random, config: TaskConfig, *, lines: tuple[int, int], writer: Writer = HOUSE, unseen: bool = False
) -> Item:
    """lines: fewest and most lines of the response; unseen: a rubric with pairs of criteria that never met."""
    criteria = draw_criteria(rng, unseen=unseen)
    signs = [1, 1, -1, -1]
    rng.shuffle(signs)
    rubric = tuple((criterion, sign * rng.choice(WEIGHTS)) for criterion, sign in zip(criteria, signs))
    others = [criterion for criterion in CRITERIA if criterion not in criteria]
    shown, written = [], []
    for _ in range(rng.randint(*lines)):
        criterion = rng.choice(criteria if rng.random() < config.rubric_share else others)
        shown.append(FLIP if rng.random() < config.flip_share else criterion)
        written.append(_write(shown[-1], writer, rng))
    start = rng.randint(0, len(TAGS) - len(shown))
    tags = TAGS[start : start + len(shown)]
    return Item(
        rubric=rubric,
        shown=tuple(shown),
        tags=tags[::-1] if writer.downwards else tags,
        written=tuple(written),
        writer=writer.name,
    )


def _write(shown: str, writer: Writer, rng: random.Random) -> str:
    word = {**SYNONYMS, FLIP: FLIP_SYNONYM}[shown] if rng.random() < writer.synonyms else shown
    return f"{rng.choice(FILLERS)} {word}" if rng.random() < writer.fillers else word
