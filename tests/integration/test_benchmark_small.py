"""The benchmark's small form with its real contestants: what it writes, and who is faster. No seconds are asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmark.plan import CENTRE, Round, small_plan
from examples.benchmark.report import memory_ratios, ratios, select
from examples.benchmark.results import Results

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "-m", "examples.benchmark.run", "--small", "--minutes", "15", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--work_dir", str(out), "--output_dir", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_planned_case_is_in_json_and_table(folder: Path) -> None:
    results = Results.load(folder / "benchmark.json")
    plan = [item for item in small_plan("tiny") if isinstance(item, Round)]
    planned = [(item.name, contestant) for item in plan for contestant in item.contestants]
    assert [(record.round, record.contestant) for record in results.records] == planned
    assert results.finished and [entry["what"] for entry in results.missing] == ["weight sync"]
    assert len(results.gemm) == 3 and all(entry["flops_per_second"] > 0 for entry in results.gemm)
    table = (folder / "benchmark.md").read_text(encoding="utf-8")
    for item in plan:
        sizes = f"{item.prompt} | {item.response} | {item.samples} |"
        assert (f"| {item.point} | {sizes}" if item.purpose == "time" else f"| {sizes}") in table, item.name
    for name in ("step_seconds", "ratios", "memory"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_all_contestants_computed_the_same_log_probs(folder: Path) -> None:
    by_round: dict[str, list[float]] = {}
    for record in Results.load(folder / "benchmark.json").records:
        by_round.setdefault(record.round, []).append(record.facts["logprob_sum"])
    for name, sums in by_round.items():
        assert len(sums) == 3 and sums == pytest.approx([sums[0]] * 3, rel=1e-4), name


def test_a_shared_prompt_is_faster_and_smaller(folder: Path) -> None:
    """Prompt 512, 8 rollouts of 16 tokens: 640 tokens against 4,224, once against two and three forward passes."""
    results = Results.load(folder / "benchmark.json")
    centre = select(results, model="tiny", point=CENTRE)
    memory = select(results, model="tiny", purpose="memory")
    for against in ("openrlhf", "authors"):
        # The best of the rounds: what else the machine does can spoil a step of a second, but not make one short.
        assert min(ratios(centre, against)) < 0.7, against
        assert max(memory_ratios(memory, against)) < 0.7, against
