"""The results of a run, in one JSON file that is complete after every step."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.benchmark.plan import Item, Round
from examples.benchmark.protocol import Case, Measured


@dataclass(frozen=True, kw_only=True)
class Record:
    """A measured step, and its place in the run. needed_flops: see `flops.needed`."""

    model: str
    point: str
    purpose: str
    round: str
    contestant: str
    case: Case
    seconds: dict[str, float]
    total: float
    peak_bytes: int
    loss: float
    needed_flops: int
    facts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, of: Round, measured: Measured, needed_flops: int) -> Record:
        return cls(
            model=of.model,
            point=of.point,
            purpose=of.purpose,
            round=of.name,
            contestant=measured.contestant,
            case=measured.case,
            seconds=measured.seconds,
            total=measured.total,
            peak_bytes=measured.peak_bytes,
            loss=measured.loss,
            needed_flops=needed_flops,
            facts=measured.facts,
        )


@dataclass(kw_only=True)
class Results:
    """
    about    machine, versions, models, arguments: what a reader must know about the run
    workers  by "model/contestant": what the worker reported when it was ready (facts, overrides)
    gemm     {"model", "when", "flops_per_second", ...} each
    missing  {"what", "why"} of everything planned and not measured
    sync     {"model": name, "real": [seconds], "openrlhf": [seconds], "facts": {}}, maybe with other ways too; or None
    """

    about: dict[str, Any]
    workers: dict[str, Any] = field(default_factory=dict)
    gemm: list[dict[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    sync: dict[str, Any] | None = None
    finished: bool = False

    def miss(self, what: Item | str, why: str) -> None:
        self.missing.append({"what": what if isinstance(what, str) else what.name, "why": why})

    def save(self, path: Path, replace: dict[str, str] | None = None) -> None:
        """replace: texts that mean something on this machine only, such as folders -> what is written instead."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        for old, new in (replace or {}).items():
            text = text.replace(old, new)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["records"] = [Record(**{**record, "case": Case(**record["case"])}) for record in data["records"]]
        return cls(**data)
