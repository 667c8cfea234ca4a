"""What is run: the cells of the tables, and the sizes.

A cell is one training (or one evaluation) of one seed. Cells of different tables that are the same training are one
cell. A method's learning rate is chosen on the validation split of the first seed, from the same rates for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WARMUPS = ("sft", "raft", "tract")
# Of the methods that are compared: their rates are searched.
OBJECTIVES = ("standard_rl", "jepo", "real")
# What the RL cells begin with, unless a table is about it (Qwen3's start in the paper).
START = "raft"


@dataclass(frozen=True, kw_only=True)
class Size:
    """
    seeds             each has its own data, base model, warm-up and RL
    base_steps        updates of the base model's making
    base_loss         above it the base cannot read, and is made anew with twice as many updates; None: whatever it is
    warmup_steps      updates of SFT, of RAFT and of each of TRACT's stages, of 64 rows
    warmup_rows       rows of feedback for these
    steps             updates of RL, of 128 rollouts
    curve_every       steps between evaluations of the cells of Figure 2
    rows              held-out rows per split
    rates, warmup_rate  learning rates that are tried; that of the warm-ups
    """

    seeds: tuple[int, ...]
    base_steps: int
    warmup_steps: int
    warmup_rows: int
    steps: int
    curve_every: int
    rows: int
    base_loss: float | None = 0.1
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 4e-4)
    warmup_rate: float = 5e-4


SIZES = {
    "tiny": Size(
        seeds=(0,),
        base_steps=2,
        base_loss=None,
        warmup_steps=2,
        warmup_rows=128,
        steps=2,
        curve_every=1,
        rows=8,
        rates=(1e-4,),
    ),
    "small": Size(
        seeds=(0, 1, 2), base_steps=800, warmup_steps=200, warmup_rows=6400, steps=60, curve_every=20, rows=250
    ),
    "full": Size(
        seeds=(0, 1, 2, 3, 4), base_steps=800, warmup_steps=200, warmup_rows=6400, steps=300, curve_every=50, rows=2000
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """
    name   of its JSON and its folder
    start  "base", a warm-up, or the name of another cell: the model that it begins with
    flags  what is asked beside the size and config.yaml
    warmup  a training by train_warmup
    curve  evaluate during training too
    """

    name: str
    start: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    warmup: bool = False
    curve: bool = False


def warmup(method: str) -> Cell:
    return Cell(name=method, start="base", flags={"warmup.method": method}, warmup=True)


def rl(objective: str, rate: float, *, start: str = START, about: str = "", **flags: Any) -> Cell:
    """about: what differs from the method's main cell; flags: with "__" for the dots of a flag's name."""
    name = f"{objective}-{start}-{rate:g}" + (f"-{about}" if about else "")
    return Cell(
        name=name,
        start=start,
        flags={
            "real.objective": objective,
            "actor.adam.lr": rate,
            **{key.replace("__", "."): value for key, value in flags.items()},
        },
        curve=not about and start == START,
    )


def search(size: Size) -> dict[str, list[Cell]]:
    """By method: the cells of which the best on the first seed's validation split gives the rate."""
    return {objective: [rl(objective, rate) for rate in size.rates] for objective in OBJECTIVES}


def tables(rates: Mapping[str, float]) -> dict[str, dict[str, Cell]]:
    """Table -> row -> cell. rates: the learning rate of each method.

    REAL's rate is that of its variants too. In Table 4 every update has 128 rollouts.
    """
    rate = rates["real"]
    main = rl("real", rate)

    def variant(about: str, **flags: Any) -> Cell:
        return rl("real", rate, about=about, **flags)

    starts = {start: rl("real", rate, start=start) for start in ("base", "sft", "tract")}
    return {
        "2": {
            **{name.upper(): warmup(name) for name in WARMUPS},
            "Standard RL": rl("standard_rl", rates["standard_rl"]),
            "JEPO": rl("jepo", rates["jepo"]),
            "REAL": main,
        },
        "3": {"N=1": main, **{f"N={n}": average_of(n, main) for n in (4, 10)}},
        "8": {
            "β=0": rl("term1_only", rate),
            "β=0.01": variant("beta0.01", real__beta=0.01),
            "β=1": main,
            "Term 2 only": rl("term2_only", rate),
            "sampled score's error, Term 1 only": rl("mse_rl", rate),
        },
        "4": {
            "K=4": variant("k4", rollout__n_samples_per_prompt=4, rollout__batch_size=32),
            "K=8": main,
            "K=16": variant("k16", rollout__n_samples_per_prompt=16, rollout__batch_size=8),
        },
        "5": {
            "λ=0": variant("lam0", real__lam=0.0),
            "λ=1": main,
            "λ=5": variant("lam5", real__lam=5.0),
            "λ=10": variant("lam10", real__lam=10.0),
        },
        "6": {
            "0<acc<1": variant("partial", real__keep_groups="partial"),
            "0<acc≤1": variant("some_right", real__keep_groups="some_right"),
            "0≤acc<1": variant("some_wrong", real__keep_groups="some_wrong"),
            "0≤acc≤1": main,
        },
        "7": {
            "from base": starts["base"],
            "from SFT": starts["sft"],
            "from RAFT": main,
            "from TRACT": starts["tract"],
        },
        "9": {
            "T=0.8": variant("t0.8", rollout__temperature=0.8, eval__temperature=0.8),
            "T=1": main,
        },
    }


def average_of(n: int, cell: Cell) -> Cell:
    """The judge of a cell, evaluated with n judgements a row."""
    return Cell(
        name=f"{cell.name}-n{n}",
        start=cell.name,
        flags={"train.max_steps": 0, "eval.n_samples_per_prompt": n},
    )
