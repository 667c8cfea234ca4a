"""What annotators write about a response: a walk through its lines with a running tally, then the score.

    L03 examples +1 L04 flattery +1 L05 irony +1 L06 slang +3 score 4

They call a criterion by the rubric's word, whatever word the response used. A careful annotator reads every line. A
sloppy one jumps lines and slips in some tallies. The score is a rater's, who saw every line: it often does not fit what
the sloppy annotator wrote.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.judging_task.items import MAX_LINES, WEIGHTS, Item, tallies
from examples.quickstart.task_files import jumping

ANCHOR = "score "
# A weight and a slip in every line.
MAX_TALLY = (max(WEIGHTS) + 1) * MAX_LINES


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """
    jumps       probabilities of going 1, 2, 3, ... lines on; None: reads every line
    slip_share  probability that a tally is off by one, which stays in those after it
    """

    name: str
    jumps: tuple[float, ...] | None = None
    slip_share: float = 0.0


CAREFUL = Annotator(name="careful")
SLOPPY = Annotator(name="sloppy", jumps=(0.4, 0.5, 0.1), slip_share=0.05)


def feedback(item: Item, annotator: Annotator, rng: random.Random) -> str:
    """What the annotator writes, without a score."""
    n = len(item.shown)
    visited = list(range(n)) if annotator.jumps is None else jumping(n, annotator.jumps, rng)
    slip, parts = 0, []
    for index, tally in zip(visited, tallies(item, visited)):
        if rng.random() < annotator.slip_share:
            slip += rng.choice((-1, 1))
        parts.append(f"{item.tags[index]} {item.shown[index]} {tally + slip:+d}")
    return " ".join(parts)


def tally_words() -> list[str]:
    """Every tally that can be written."""
    return [f"{i:+d}" for i in range(-MAX_TALLY, MAX_TALLY + 1)]
