"""The judgements that a page shows: of the first and the last step, the worst errors, those without a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.controller.report.charts import MANY_VALUES, Line, probabilities
from real_openrlhf.controller.report.records import Run

# Of each kind.
SHOWN = 4
# Characters of a text, from its start.
LONGEST = 4000
Facts = list[tuple[str, str]]


def judgements(run: Run) -> list[dict[str, Any]]:
    """Titles with their cards, as page.html takes them."""
    parts: list[dict[str, Any]] = []
    rollouts = [("Rollouts of the first step", run.first)]
    if run.last and run.last[0].get("step") != run.first[0].get("step"):
        rollouts.append(("Rollouts of the last step", run.last))
    for title, lines in rollouts:
        cards = [_rollout(run.scale, line) for line in lines[:SHOWN]]
        parts.append({"title": f"{title}, {number(lines[0].get('step'))}" if lines else title, "cards": cards})
    if run.judged:
        parts += _held_out(run)
    return [part for part in parts if part["cards"]]


def _held_out(run: Run) -> list[dict[str, Any]]:
    """The last evaluation's rows, each beside what the first one said of it."""
    step, now = run.judged[-1]
    before = {_key(row): row for row in run.judged[0][1]} if len(run.judged) > 1 else {}

    def cards(rows: Sequence[Line]) -> list[dict[str, Any]]:
        return [_row(run, row, before.get(_key(row))) for row in rows[:SHOWN]]

    scored = [row for row in now if _known(row.get("expected")) and _known(row.get("label"))]
    worst = sorted(scored, key=lambda row: -abs(row["expected"] - row["label"]))
    return [
        {"title": f"Held out: the first rows of the evaluation after step {step}", "cards": cards(now)},
        {"title": f"Held out: the worst errors of E[score] after step {step}", "cards": cards(worst)},
        {
            "title": f"Held out: without a score after step {step}",
            "cards": cards([row for row in now if row.get("expected") is None]),
        },
    ]


def _key(row: Line) -> tuple[str, str]:
    return str(row.get("benchmark")), str(row.get("row"))


def _rollout(scale: ScoreScale | None, line: Line) -> dict[str, Any]:
    facts = [("row", number(line.get("row"))), ("label", number(line.get("label")))]
    said = _said(scale, line, [("reward", line.get("reward")), ("advantage", line.get("advantage"))])
    return {"facts": facts, "prompt": _prompt(line), "said": [said]}


def _row(run: Run, row: Line, before: Line | None) -> dict[str, Any]:
    facts = [(str(row.get("benchmark")), f"row {number(row.get('row'))}"), ("label", number(row.get("label")))]
    said = [] if before is None else [_said(run.scale, before, [("step", run.judged[0][0])])]
    said.append(_said(run.scale, row, [("step", run.judged[-1][0])]))
    return {"facts": facts, "prompt": _prompt(row), "said": said}


def _prompt(line: Line) -> str:
    tail = line.get("prompt_tail")
    return f"... {tail}" if isinstance(tail, str) and tail else ""


def _said(scale: ScoreScale | None, line: Line, more: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    facts: Facts = [(title, number(value)) for title, value in more if value is not None]
    facts += [("E[score]", number(line.get("expected"))), ("written", number(line.get("decoded")))]
    if line.get("mass") is not None:
        facts.append(("mass", number(line["mass"])))
    if line.get("reason"):
        facts.append(("no score:", str(line["reason"])))
    shares = None if scale is None or len(scale) > MANY_VALUES else probabilities(scale, line)
    text = str(line.get("text") or "")
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} [... {len(text) - LONGEST} more characters]"
    said: dict[str, Any] = {"facts": facts, "text": text, "bars": []}
    if scale is not None and shares is not None:
        said["bars"] = _bars(scale, shares, line.get("label"))
        said["alt"] = ", ".join(f"{label}: {share:.2f}" for label, share in zip(scale.labels, shares))
    return said


def _bars(scale: ScoreScale, shares: Sequence[float], label: Any) -> list[Mapping[str, Any]]:
    """One a label of the scale; `right`: the values that the human label is at, or lies between."""
    near: set[int] = set()
    if _known(label):
        distances = [abs(value - label) for value in scale.values]
        near = {i for i, distance in enumerate(distances) if distance == min(distances)}
    return [
        {"label": name, "share": f"{share:.3f}", "height": round(70 * min(max(share, 0.0), 1.0), 1), "right": i in near}
        for i, (name, share) in enumerate(zip(scale.labels, shares))
    ]


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.2f}"
    return str(value)
