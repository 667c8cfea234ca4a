"""The benchmark's report on made-up results, with numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.benchmark.plan import CENTRE
from examples.benchmark.protocol import CONTESTANTS, Case
from examples.benchmark.report import (
    disagreement,
    gemm_share,
    main,
    memory_ratios,
    ratios,
    select,
    spread,
    text,
    write_report,
)
from examples.benchmark.results import Record, Results

GIB = 2**30
SHAPE = {"vocabulary": 151936}


def record(name: str, turn: int, total: float, **more: object) -> Record:
    values = {
        "model": "large",
        "point": CENTRE,
        "purpose": "time",
        "round": f"{more.get('model', 'large')} {more.get('point', CENTRE)} {more.get('purpose', '')} {turn}",
        "contestant": name,
        "case": Case(prompt=1024, response=128, samples=16, micro_batch=16 if name == "real" else 2),
        "seconds": {"forward": total / 4, "backward": total / 2},
        "total": total,
        "peak_bytes": GIB,
        "loss": 0.5,
        "needed_flops": 600,
        **more,
    }
    return Record(**values)  # type: ignore[arg-type]


@pytest.fixture
def results() -> Results:
    made = Results(
        about={
            "command": "bash examples/benchmark/run.sh",
            "small": False,
            "minutes": 60,
            "wall_minutes": 58.5,
            "seed": 0,
            "learning_rate": 1e-8,
            "logits_mb": 1024,
            "device": "cpu",
            "dtype": "fp32",
            "cpu": "Some CPU",
            "cores": 2,
            "memory_gib": 23.5,
            "versions": {"torch": "2.13.0"},
            "models": {"large": SHAPE, "narrow": SHAPE},
        },
        finished=True,
    )
    # Ratios of the rounds: 10 / 100, 30 / 100 and 12 / 60, and to the authors 10 / 200, 30 / 150 and none.
    for turn, totals in enumerate([(10, 100, 200), (30, 100, 150), (12, 60, None)]):
        made.records += [record(c, turn, t) for c, t in zip(CONTESTANTS, totals) if t is not None]
    made.gemm = [
        {"model": "large", "when": when, "flops_per_second": rate}
        for when, rate in (("before", 80.0), ("middle", 100.0), ("after", 300.0))
    ]
    return made


def test_ratios_are_those_of_runs_of_the_same_round(results: Results) -> None:
    centre = select(results, model="large", point=CENTRE)
    assert ratios(centre, "openrlhf") == pytest.approx([0.1, 0.3, 0.2])
    assert ratios(centre, "authors") == pytest.approx([0.05, 0.2])
    assert spread(ratios(centre, "openrlhf"), 3) == "0.200 [0.100, 0.300]"
    assert spread([0.125], 3) == "0.125" and spread([]) == "-"


def test_share_of_the_gemm_rate(results: Results) -> None:
    # Steps of 10, 30 and 12 s do 60, 20 and 50 operations per second; the rate is 100.
    assert gemm_share(results, "large", "real") == pytest.approx(0.5)
    assert gemm_share(results, "narrow", "real") is None


def test_memory_ratios() -> None:
    records = [
        record("real", 0, 1, purpose="memory", peak_bytes=GIB),
        record("openrlhf", 0, 1, purpose="memory", peak_bytes=4 * GIB),
        record("openrlhf", 1, 1, purpose="memory", peak_bytes=4 * GIB),
    ]
    assert memory_ratios(records, "openrlhf") == [0.25] and memory_ratios(records, "authors") == []


def test_contestants_that_computed_something_else_are_seen(results: Results) -> None:
    assert disagreement(results, "large") is None
    results.records = [
        record("real", 0, 1, facts={"logprob_sum": -100.0}),
        record("openrlhf", 0, 1, facts={"logprob_sum": -80.0}),
        record("openrlhf", 1, 1, facts={"logprob_sum": -7.0}),
    ]
    assert disagreement(results, "large") == pytest.approx(0.2)


def rows(markdown: str, first: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables(results: Results) -> None:
    results.records.append(record("real", 0, 4.0, model="narrow", point="P=256"))
    results.records += [
        record(
            name,
            0,
            1,
            purpose="memory",
            peak_bytes=peak * GIB,
            case=Case(prompt=1024, response=128, samples=4, micro_batch=4),
        )
        for name, peak in (("real", 3), ("openrlhf", 4), ("authors", 6))
    ]
    results.miss("narrow P=2048, repeat 2", "no time: about 250 s needed")
    results.sync = {"model": "large", "real": [1.0, 3.0, 2.0], "openrlhf": [4.0, 4.0, 5.0], "facts": {"engines": 1}}
    results.workers = {"large/openrlhf": {"facts": {"threads": 2}, "overrides": ["optimizer: torch's"]}}
    shown = text(results)
    (centre,) = rows(shown, "centre | 1024 | 128 | 16 | 3,072")
    assert centre[4:] == [
        "3,072 / 18,432",
        "12.0 [10.0, 30.0]",
        "100.0 [60.0, 100.0]",
        "175.0 [150.0, 200.0]",
        "0.200 [0.100, 0.300]",
        "0.125 [0.050, 0.200]",
    ]
    (real, *_) = rows(shown, "real | 3")
    # 2,048 rollout tokens in 12, 10 and 30 s; the phases are 1/4 and 1/2 of the step.
    assert real == [
        "real",
        "3",
        "16",
        "12.0 [10.0, 30.0]",
        "",
        "",
        "",
        "3.0",
        "6.0",
        "",
        "3.0",
        "170.7 [68.3, 204.8]",
        "50.0%",
    ]
    (memory,) = rows(shown, "1024 | 128 | 4")
    assert memory[3:] == ["no", "3.00", "4.00", "6.00", "0.750", "0.500"]
    aims = {line[0]: line[1:] for line in rows(shown, "large:") + rows(shown, "weight sync")}
    assert aims["large: training seconds, real/openrlhf"] == ["at most 0.2", "0.200", "yes"]
    assert aims["large: training seconds, real/authors"] == ["at most 0.15", "0.125", "yes"]
    assert aims["large: peak memory, real/openrlhf, K=4"] == ["at most 0.5", "0.750", "**no**"]
    assert aims["large: needed FLOPs, share of the GEMM rate"] == ["at least 0.5", "0.500", "yes"]
    assert aims["weight sync, real/openrlhf"] == ["at most 0.4", "0.500", "**no**"]
    assert rows(shown, "narrow: training")[0][2:] == ["-", "not measured"]
    assert "- not measured: narrow P=2048, repeat 2: no time: about 250 s needed" in shown
    assert "override: optimizer: torch's" in shown and "not finished" not in shown


def test_a_results_file_survives_being_written_and_read(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    results.about["folder"] = "/home/me/models/large"
    results.save(path, {"/home/me": "."})
    back = Results.load(path)
    assert back.records == results.records and back.about["folder"] == "./models/large"


def test_a_partial_file_is_reported(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.finished, results.records, results.gemm = False, results.records[:1], []
    results.save(tmp_path / "benchmark.json")
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path / "benchmark.json")])
    main()
    assert "**The run was not finished.**" in (tmp_path / "benchmark.md").read_text()


def test_plots_are_pictures_of_some_size(results: Results, tmp_path: Path) -> None:
    results.records += [
        record(
            name, 0, total, model="narrow", point=point, case=Case(prompt=p, response=128, samples=16, micro_batch=2)
        )
        for point, p in ((CENTRE, 1024), ("P=256", 256))
        for name, total in zip(CONTESTANTS, (1.0, 5.0, 7.0))
    ]
    write_report(results, tmp_path)
    for name in ("step_seconds", "ratios", "memory"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and 5_000 < len(data) < 150_000, name
