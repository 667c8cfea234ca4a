"""Memory and time of a plan as tables of plain text."""

from __future__ import annotations

from real_openrlhf.run.fitting import gb
from real_openrlhf.run.memory import MemoryPlan, Place, host_bytes
from real_openrlhf.run.time_plan import TimePlan


def memory_lines(plan: MemoryPlan) -> list[str]:
    lines = [f"GB of each GPU, which has {plan.card / 1e9:.1f}; * from shapes and flags, else an estimate"]
    for place in plan.places:
        lines += _table(place, plan.card)
    engine = plan.engine
    if plan.known and engine.needed:
        lines.append(f"KV cache of an engine: {engine.cache_tokens} tokens")
    if not plan.known:
        lines.append("layers of a kind that is not known: nothing is said of activations, KV cache and time")
    host = ", ".join(f"{term.name} {gb(term.bytes)}" for term in plan.host)
    lines.append(f"CPU memory of a policy node: {gb(host_bytes(plan.host))} ({host})")
    return lines


def _table(place: Place, card: int) -> list[str]:
    """Phases are columns, terms are rows; what is nothing in all phases is left out."""
    names = dict.fromkeys(term.name for phase in place.phases for term in phase.terms if term.bytes)
    exact = {term.name for phase in place.phases for term in phase.terms if term.exact}
    rows = []
    for name in names:
        found = [sum(term.bytes for term in phase.terms if term.name == name) for phase in place.phases]
        rows.append([f"{name}{'*' if name in exact else ''}", *(f"{b / 1e9:.1f}" if b else "" for b in found)])
    totals = ["in all", *(f"{phase.total / 1e9:.1f}{'' if phase.total <= card else ' !'}" for phase in place.phases)]
    head = [f"{place.name}, {place.gpus} GPU(s)", *(phase.name for phase in place.phases)]
    return _aligned([head, *rows, totals])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def time_lines(plan: TimePlan, total_steps: int, *, at_most: bool) -> list[str]:
    """Seconds of a step's phases and hours of the run."""
    lines = [f"seconds of a step, by the rates of {plan.card}; responses as long as they may be, estimates"]
    rows = [[phase.name, f"{phase.seconds:.1f}", phase.bound] for phase in plan.phases]
    rows.append(["a step", f"{plan.step:.1f}", ""])
    width = max(len(row[0]) for row in rows)
    lines += [f"{name.ljust(width)}  {seconds:>8}  {bound}".rstrip() for name, seconds, bound in rows]
    bound = "at most " if at_most else ""
    lines.append(f"{plan.at_once} rollouts at a time per engine; {bound}{plan.step * total_steps / 3600:.1f} h in all")
    return lines
