"""The benchmark's run with contestants that only pretend: turns, the budget, and what becomes of those that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmark import bench
from examples.benchmark.bench import WARM_UP, Bench, Options
from examples.benchmark.models import SPECS
from examples.benchmark.plan import CENTRE, Round, WeightSync, full_plan, small_plan
from examples.benchmark.processes import Worker, WorkerError
from examples.benchmark.protocol import CONTESTANTS, Case
from examples.benchmark.report import write_report
from examples.benchmark.results import Results
from examples.benchmark.run import about, main, parse_args
from real_openrlhf.common.device import Device

FAKE = (sys.executable, str(Path(__file__).parents[2] / "helpers" / "fake_contestant.py"))
DEVICE = Device.resolve("cpu")


@pytest.fixture(autouse=True)
def no_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GEMM_SECONDS", 0.0)
    rates = iter([4e9, 8e9, 5e9] * 9)
    monkeypatch.setattr(bench, "gemm_rate", lambda model, device, env: {"flops_per_second": next(rates)})


def make_config(folder: Path, name: str = "tiny") -> Path:
    spec = SPECS[name]
    config = {
        "model_type": "qwen3",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": 32,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def carry_out(
    tmp_path: Path, plan: list, minutes: float = 60.0, names: tuple[str, ...] = ("tiny",), sync: Path | None = None
) -> Results:
    models = {name: make_config(tmp_path / "models" / name) for name in names}
    args = parse_args(["--small", "--work_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    results = Results(about=about(args, DEVICE, models))
    options = Options(
        minutes=minutes,
        seed=0,
        learning_rate=1e-8,
        logits_mb=64,
        models=models,
        device=DEVICE,
        work_dir=tmp_path,
        output=tmp_path / "out" / "benchmark.json",
        worker=FAKE,
        sync=sync,
    )
    with Bench(options, results) as run:
        run.run(plan)
    return Results.load(options.output)


def planned(plan: list) -> list[tuple[str, str]]:
    return [(item.name, contestant) for item in plan if isinstance(item, Round) for contestant in item.contestants]


def measured(results: Results) -> list[tuple[str, str]]:
    return [(record.round, record.contestant) for record in results.records]


def test_all_that_is_planned_is_measured_in_its_order(tmp_path: Path) -> None:
    plan = small_plan("tiny")
    results = carry_out(tmp_path, plan)
    assert measured(results) == planned(plan)
    assert results.finished and results.missing == []
    assert set(results.workers) == {f"tiny/{name}" for name in CONTESTANTS}
    assert [entry["when"] for entry in results.gemm] == ["before", "middle", "after"]
    first = results.records[0]
    assert first.total == pytest.approx((512 + 8 * 16) * 1e-3) and first.contestant == "real"


def test_no_folder_of_this_machine_is_written_down(tmp_path: Path) -> None:
    carry_out(tmp_path, small_plan("tiny")[:1])
    text = (tmp_path / "out" / "benchmark.json").read_text()
    assert '"model": "tiny"' in text  # the fake says its --model
    assert str(tmp_path) not in text and str(bench.ROOT) not in text


def test_the_full_plan_within_its_budget(tmp_path: Path) -> None:
    """The fake says how long a step took and does not take it, so everything fits."""
    plan = full_plan("large", "narrow")
    results = carry_out(tmp_path, plan, names=("large", "narrow"))
    assert measured(results) == planned(plan)
    assert [entry["what"] for entry in results.missing] == ["large weight sync"]


def test_what_does_not_fit_is_left_out_and_named(tmp_path: Path) -> None:
    plan = small_plan("tiny")
    results = carry_out(tmp_path, plan, minutes=0.25)
    # About 10 s per round by the fake's own word, and starts guessed at 40 s: the first round is already too dear.
    assert measured(results) == []
    assert [entry["what"] for entry in results.missing] == [item.name for item in plan]
    assert all("no time" in entry["why"] and "0.25 min" in entry["why"] for entry in results.missing)


def test_a_cheaper_round_is_run_where_a_dear_one_does_not_fit(tmp_path: Path) -> None:
    centre, *_ = small_plan("tiny")
    dear = Round(
        model="tiny",
        point="P=9",
        contestants=CONTESTANTS,
        prompt=10**6,
        response=16,
        samples=8,
        plain_micro=2,
    )
    results = carry_out(tmp_path, [dear, centre], minutes=4.0)
    assert measured(results) == planned([centre])
    assert [entry["what"] for entry in results.missing] == [dear.name]


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("die", "exit code 7): out of everything"),
        ("deny", "cannot"),
        ("nan", "with loss nan"),
        ("noise", "something else than JSON: 'Loading checkpoint shards'"),
        ("broken", "no such model"),
    ],
)
def test_a_contestant_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, why: str
) -> None:
    monkeypatch.setenv("FAKE_CONTESTANT", f"authors:{behaviour}")
    plan = small_plan("tiny")[:2]
    results = carry_out(tmp_path, plan)
    assert measured(results) == [step for step in planned(plan) if step[1] != "authors"]
    assert any(why in entry["why"] for entry in results.missing), results.missing
    for name, contestant in planned(plan):
        assert contestant != "authors" or any(entry["what"] == f"{name}: authors" for entry in results.missing)
    assert results.finished
    write_report(results, tmp_path / "out")


def test_a_step_that_hangs_is_ended_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CONTESTANT", "openrlhf:hang")
    monkeypatch.setattr(bench, "Estimates", lambda **more: Cheap())
    monkeypatch.setattr(Bench, "left", property(lambda self: 1.0 if self.results.records else 60.0))
    centre = small_plan("tiny")[0]
    results = carry_out(tmp_path, [centre])
    assert measured(results)[0] == planned([centre])[0]
    assert (f"{centre.name}: openrlhf", "the time was up: ended") in [tuple(e.values()) for e in results.missing]


class Cheap:
    """Estimates by which everything is nearly free."""

    rate = 0.0

    def observe(self, *args: object) -> None: ...

    def observe_start(self, *args: object) -> None: ...

    def step(self, *args: object) -> float:
        return 1e-6

    def item(self, *args: object) -> float:
        return 1e-6


def test_weight_sync_is_taken_from_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sync_timing.py"
    program.write_text("")
    ran = []

    class Program(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **more: object) -> None:
            if "examples.benchmark.sync_timing" in command:
                ran.append(command)
                said = {"real": [1.0, 2.0], "openrlhf": [4.0, 6.0], "facts": {"parameters": 7}}
                Path(command[command.index("--output") + 1]).write_text(json.dumps(said))
                command = ["true"]
            super().__init__(command, **more)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(bench.subprocess, "Popen", Program)
    results = carry_out(tmp_path, [small_plan("tiny")[0], WeightSync(model="tiny")], sync=program)
    assert results.sync is not None and results.sync["real"] == [1.0, 2.0] and results.sync["model"] == "tiny"
    (command,) = ran
    assert command[command.index("--model") + 1] == str(tmp_path / "models" / "tiny")
    assert results.missing == []


def test_memory_rounds_have_a_process_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    started: list[str] = []

    class Counted(Worker):
        def __init__(self, command: list[str], **more: object) -> None:
            super().__init__(command, **more)  # type: ignore[arg-type]
            running.append(1)
            started.append(command[command.index("--contestant") + 1])

        def step(self, case: Case, seed: int, seconds: float):  # type: ignore[no-untyped-def]
            if case not in WARM_UP:
                at_once.append(len(running))
            return super().step(case, seed, seconds)

        def kill(self) -> None:
            running.pop()
            super().kill()

    at_once: list[int] = []
    monkeypatch.setattr(bench, "Worker", Counted)
    plan = [item for item in full_plan("tiny", "tiny") if isinstance(item, Round)]
    centre = next(item for item in plan if item.point == CENTRE)
    alone = next(item for item in plan if item.alone and len(item.contestants) == 3)
    carry_out(tmp_path, [centre, alone])
    assert at_once == [3, 3, 3, 1, 1, 1] and running == []
    assert started == [*CONTESTANTS, *CONTESTANTS]


def test_a_step_that_takes_the_machines_memory_is_ended(tmp_path: Path) -> None:
    free = iter([8 * 2**30, 2**28])
    worker = Worker(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={},
        cwd=tmp_path,
        log=tmp_path / "log",
        free=lambda: next(free),
    )
    with pytest.raises(WorkerError, match="does not fit into memory"):
        worker.ready(30)
    assert not worker.alive


def test_a_worker_that_answers_another_case_is_refused(tmp_path: Path) -> None:
    other = {"prompt": 1, "response": 3, "samples": 2, "micro_batch": 1}
    said = {"contestant": "real", "case": other, "seconds": {}, "total": 1.0, "peak_bytes": 1, "loss": 1.0}
    code = f"import sys; sys.stdin.readline(); print({json.dumps(said)!r}, flush=True)"
    worker = Worker([sys.executable, "-c", code], env={}, cwd=tmp_path, log=tmp_path / "log")
    try:
        with pytest.raises(WorkerError, match="was asked for"):
            worker.step(WARM_UP[0], 0, 30)
    finally:
        worker.kill()


def test_flags_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--work_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    for flags, message in (
        (common, "--large is needed"),
        ([*common, "--small", "--only", "narrow"], "--only chooses between the models of the full run"),
        ([*common, "--small", "--minutes", "0"], "--minutes must be above 0"),
        ([*common, "--large", str(tmp_path / "none")], "no config.json there"),
    ):
        with pytest.raises(SystemExit):
            parse_args(flags)
        assert message in capsys.readouterr().err


def test_the_command_writes_json_tables_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.benchmark.run.make", lambda name, folder, seed: make_config(folder))
    out = tmp_path / "out"
    assert main(["--small", "--work_dir", str(tmp_path), "--output_dir", str(out)], worker=FAKE) == 0
    assert {path.name for path in out.iterdir()} >= {"benchmark.json", "benchmark.md", "ratios.png", "memory.png"}
    assert "- not measured: weight sync: --small leaves it out" in (out / "benchmark.md").read_text()


def test_one_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.benchmark.run.make", lambda name, folder, seed: make_config(folder, name))
    out = tmp_path / "out"
    flags = ["--only", "narrow", "--work_dir", str(tmp_path), "--output_dir", str(out)]
    assert main(flags, worker=FAKE) == 0
    results = Results.load(out / "benchmark.json")
    assert {record.model for record in results.records} == {"narrow"}
    assert " --only narrow " in results.about["command"] and list(results.about["models"]) == ["narrow"]
