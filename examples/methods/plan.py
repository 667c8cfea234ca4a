"""What is run: the methods that are compared, and what an example says about its data and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale

START, RAFT = "start", "raft"
# Objective of train_real -> what tables call it. REAL comes last: it is compared with the others.
METHODS = {"standard_rl": "Standard RL", "term2_only": "Term 2 only", "real": "REAL"}
MAIN = "real"
# Of SmolLM2-135M, which has 30 layers.
_LINEAR = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """
    about          one line for the page: the machine that it is for, and what is left out
    seeds          each has its own warm-up and RL; the data are the same
    prepare        words for the example's prepare.py
    dev_rows       rows that are judged during training (None: all)
    test_rows      rows that the tables are about, per test (None: all)
    steps          updates of RL
    curve_every    updates of RL between judgements of the dev rows
    rates          learning rates of RL; several are searched, on the dev rows of the first seed
    both, warmup, rl   flags of both commands, of train_warmup, of train_real
    keep_engines   one set of engines serves all cells; not where engines and policy share a GPU
    save_steps     steps between checkpoints of a training
    """

    about: str
    seeds: tuple[int, ...]
    steps: int
    curve_every: int
    rates: tuple[float, ...]
    warmup: Mapping[str, Any]
    rl: Mapping[str, Any]
    both: Mapping[str, Any] = field(default_factory=dict)
    prepare: Sequence[str] = ()
    dev_rows: int | None = None
    test_rows: int | None = None
    keep_engines: bool = True
    save_steps: int = -1


@dataclass(frozen=True, kw_only=True)
class Example:
    """
    folder   holds config.yaml and warmup.yaml
    prepare  main of its prepare.py
    tests    names of the data files that judges are tested on; the first is the main one, of the others only
             correlations are shown
    """

    name: str
    folder: Path
    scale: ScoreScale
    prepare: Callable[[Sequence[str]], None]
    tests: Sequence[str]
    sizes: Mapping[str, Size]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and the judgements of its model; objective None: the warm-up, or for START no training."""

    name: str
    title: str
    objective: str | None = None
    rate: float | None = None


def first_cells() -> list[Cell]:
    return [Cell(name=START, title="Start"), Cell(name=RAFT, title="RAFT")]


def rl(objective: str, rate: float) -> Cell:
    return Cell(name=f"{objective}-{rate:g}", title=METHODS[objective], objective=objective, rate=rate)


def cells(rates: Mapping[str, float]) -> list[Cell]:
    """All that the tables show, in their order. rates: the learning rate of each method."""
    return [*first_cells(), *(rl(objective, rates[objective]) for objective in METHODS)]


def all_cells(size: Size, chosen: Mapping[str, float] | None = None) -> Iterator[tuple[int, str]]:
    """(seed, name) of every cell that a run of this size makes: on the first seed the start and all learning rates, on
    the others the chosen one of each method. chosen None: not chosen yet, and the size's first rate stands for it."""
    for seed in size.seeds:
        first = seed == size.seeds[0]
        yield from ((seed, cell.name) for cell in first_cells() if first or cell.name != START)
        for objective in METHODS:
            rates = size.rates if first else [size.rates[0] if chosen is None else chosen[objective]]
            yield from ((seed, rl(objective, rate).name) for rate in rates)


def last_layers(first: int, rank: int) -> dict[str, Any]:
    """Flags for LoRA on SmolLM2-135M's layers from `first` on: the backward pass ends there."""
    targets = tuple(f"{layer}.{name}" for layer in range(first, 30) for name in _LINEAR)
    return {"ds.lora.rank": rank, "ds.lora.alpha": 2 * rank, "ds.lora.target_modules": targets}
