"""The GPU benchmark's plan, its memory estimates and its report, on numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.benchmark import gpu, gpu_report
from examples.benchmark.flops import Shape, needed
from examples.benchmark.gpu_models import SIZES, depths, make_weights_from_config, write_config
from examples.benchmark.gpu_plan import Memory, Point, largest_micro_batch, pass_peak, points, probes
from examples.benchmark.gpu_profile import summary, text
from examples.benchmark.processes import WorkerError
from examples.benchmark.protocol import Case, Measured

GB = 10**9
CENTRE = Point(kind="centre", prompt=2048, response=512, samples=16)


def measured(case: Case, peaks: dict[str, int], seconds: float = 1.0) -> Measured:
    return Measured(
        contestant="real", case=case, seconds={"forward": seconds}, total=seconds,
        peak_bytes=max(peaks.values()), loss=0.0, facts={"logprob_sum": -8.0}, peaks=peaks,
    )  # fmt: skip


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_centre_comes_first_then_memory_then_what_differs_least() -> None:
    found = points((2048, 512, 16), (1024, 2048), (128, 512), (8, 16), gradient_checkpointing=False, only_centre=False)
    shown = [(p.kind, p.prompt, p.response, p.samples) for p in found]
    assert shown == [
        ("centre", 2048, 512, 16),
        ("memory", 2048, 512, 16), ("memory", 2048, 512, 8), ("memory", 2048, 512, 4),
        ("around", 2048, 128, 16), ("around", 1024, 512, 16), ("around", 2048, 512, 8),
        ("around", 1024, 128, 16), ("around", 2048, 128, 8), ("around", 1024, 512, 8),
        ("around", 1024, 128, 8),
    ]  # fmt: skip
    assert [p.gradient_checkpointing for p in found[:5]] == [False, True, True, True, False]


def test_of_a_part_of_the_depth_only_the_centre_is_asked() -> None:
    found = points((48, 12, 4), (24, 48), (8,), (2, 4), gradient_checkpointing=True, only_centre=True)
    assert {p.kind for p in found} == {"centre", "memory"}
    assert all(p.gradient_checkpointing for p in found)


def test_depths() -> None:
    # 1.72 billion weights of 22 bytes are 38 GB, within 60% of 80; 4.02 billion are 88.
    assert depths(SIZES["1.7b"], layers=0, total_bytes=80 * GB) == [28]
    few, many = depths(SIZES["4b"], layers=0, total_bytes=80 * GB)
    assert many == 2 * few and SIZES["4b"].parameters(many) * 22 <= 48 * GB < SIZES["4b"].parameters(many + 2) * 22
    assert depths(SIZES["32b"], layers=3, total_bytes=80 * GB) == [3, 6]
    assert depths(SIZES["tiny"], layers=9, total_bytes=None) == depths(SIZES["tiny"], layers=0, total_bytes=None) == [4]


@pytest.mark.parametrize(("model", "billions"), [("smollm2", 0.1345), ("1.7b", 1.72), ("4b", 4.02), ("32b", 32.76)])
def test_sizes_are_those_of_the_models(model: str, billions: float) -> None:
    assert SIZES[model].parameters() / 1e9 == pytest.approx(billions, rel=2e-3)


def test_weights_come_from_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape is the one that the operations are counted of, and two loads are equal."""
    from transformers import AutoModelForCausalLM

    folder = write_config("tiny", 2, tmp_path / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", AutoModelForCausalLM.from_pretrained)
    make_weights_from_config(torch.device("cpu"))
    first, second = (
        AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="sdpa", **{key: torch.float32})
        for key in ("dtype", "torch_dtype")
    )
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    matrices = sum(p.numel() for p in first.parameters() if p.dim() == 2)
    assert matrices == SIZES["tiny"].parameters(2)
    assert Shape.of(folder) == gpu_report.shape_of("tiny", 2)
    assert first.model.embed_tokens.weight is first.lm_head.weight


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_a_line_over_the_tokens_of_a_micro_batch() -> None:
    small, large = probes("openrlhf", CENTRE)
    assert [(c.samples, c.micro_batch) for c in (small, large)] == [(2, 1), (2, 2)]
    # 2,560 tokens a row: 1 GB and 1 GB per row forward; backward 3 GB whatever there is; the optimizer does not count.
    line = Memory.of(
        "openrlhf",
        measured(small, {"forward": 2 * GB, "backward": 3 * GB, "optimizer": 50 * GB}),
        measured(large, {"forward": 3 * GB, "backward": 3 * GB, "optimizer": 50 * GB}),
    )
    assert line.bytes(2560) == pytest.approx(3 * GB)
    assert line.bytes(16 * 2560) == pytest.approx(17 * GB)

    def fits(total: float) -> int | None:
        return largest_micro_batch("openrlhf", CENTRE, line, held=10 * GB, total=int(total * GB))

    assert fits(27.1 / 0.9) == 16 and fits(26.9 / 0.9) == 8
    assert fits(13.1 / 0.9) == 2 and fits(12.9 / 0.9) is None
    assert largest_micro_batch("openrlhf", CENTRE, None, held=None, total=None) == 16


def test_this_projects_rows_hold_the_prompt_once() -> None:
    few, many = probes("real", CENTRE)
    assert [(c.samples, c.micro_batch) for c in (few, many)] == [(4, 2), (4, 4)]
    # 2,048 + 2 * 512 tokens and 2,048 + 4 * 512: one MB per token.
    line = Memory.of("real", measured(few, {"forward": 3072 * 10**6}), measured(many, {"forward": 4096 * 10**6}))
    assert line.bytes(2048 + 16 * 512) == pytest.approx(10_240 * 10**6)
    assert largest_micro_batch("real", CENTRE, line, held=0, total=12 * GB) == 16
    assert largest_micro_batch("real", CENTRE, line, held=0, total=11 * GB) == 8


def test_the_optimizers_memory_is_not_the_passes() -> None:
    assert pass_peak({"forward": 3, "backward": 4, "optimizer": 9, "old_logprobs": 2}) == 4


class FakeProcess:
    """Runs out of memory above 4 rollouts in a micro-batch."""

    alive = True

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def step(self, case: Case, seed: int, seconds: float) -> Measured:
        self.cases.append(case)
        if case.micro_batch > 4:
            raise WorkerError("OutOfMemoryError: CUDA out of memory")
        return measured(case, {"forward": GB}, seconds=float(len(self.cases)))


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_first_step_not_counted() -> None:
    run: dict[str, Any] = {
        "facts": {"total_bytes": None, "held_bytes": None}, "steps": [], "left_out": [], "failed": [],
    }  # fmt: skip
    task, process = gpu.Task(model="tiny", layers=4, contestant="openrlhf"), FakeProcess()
    contest = gpu.Contest(task, process, gpu_report.shape_of("tiny", 4), run, deadline=0, end=0)  # type: ignore[arg-type]
    step = contest.measure(CENTRE)
    assert step is not None and step["case"]["micro_batch"] == 4 and len(run["failed"]) == 2
    assert [c.micro_batch for c in process.cases] == [16, 8, 4, 4, 4, 4]
    assert step["seconds"] == [4, 5, 6] and step["median"] == 5
    # The deadline is over: what is not the centre is left out, and named.
    assert contest.measure(Point(kind="around", prompt=8, response=8, samples=2)) is None
    assert run["left_out"] == [{"point": "around: P=8, R=8, K=2", "why": "no time"}]


# -- the report --------------------------------------------------------------------------------------------------------


def run_of(contestant: str, layers: int, seconds: float, peak: int, model: str = "1.7b") -> dict[str, Any]:
    case = {"prompt": 2048, "response": 512, "samples": 16, "gradient_checkpointing": False}
    micro = 16 if contestant == "real" else 2
    common = {"phases": {"forward": seconds}, "facts": {"logprob_sum": -100.0}, "peak_passes": peak, "peak_all": peak}
    return {
        "model": model, "layers": layers, "contestant": contestant, "left_out": [], "failed": [], "overrides": ["o"],
        "facts": {"card": "a card", "dtype": "bf16", "gradient_bytes": 1},
        "steps": [
            {"kind": "centre", "case": {**case, "micro_batch": micro}, "median": seconds, **common},
            {"kind": "memory", "case": {**case, "micro_batch": 16}, "median": 9.0, **common},
        ],
    }  # fmt: skip


def results_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    for run in runs:
        if run["contestant"] == "real":
            run["gemm"] = {"flops_per_second": 5e14, "dtype": "bf16", "rows": 8192}
    return {"command": "c", "started": "s", "alloc_conf": "", "versions": {}, "runs": runs}


def test_verdicts(tmp_path: Path) -> None:
    shape = gpu_report.shape_of("1.7b", 28)
    flops = needed(shape, Case(prompt=2048, response=512, samples=16, micro_batch=16))
    seconds = flops / 5e14 / 0.45  # a share of 45%
    results = results_of([run_of("real", 28, seconds, 10), run_of("openrlhf", 28, 2 * seconds, 40)])
    words = gpu_report.write_report(results, tmp_path)
    assert results["table"][0]["mfu"] == pytest.approx(0.45)
    assert results["table"][0]["ratio"] == 0.5 and results["memory"][0]["ratio"] == 0.25
    assert [a["met"] for a in results["aims"]] == [True, False, True, None, None, None]
    assert "**no**" in words and (tmp_path / "gpu.md").read_text(encoding="utf-8") == words
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["aims"] == results["aims"]
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_the_whole_depth_lies_on_the_line_through_two(tmp_path: Path) -> None:
    runs = [
        run_of("real", 9, 1.0, 10, "4b"), run_of("openrlhf", 9, 3.0, 30, "4b"),
        run_of("real", 18, 1.6, 10, "4b"), run_of("openrlhf", 18, 5.0, 30, "4b"),
    ]  # fmt: skip
    results = results_of(runs)
    words = gpu_report.write_report(results, tmp_path)
    (row,) = results["extrapolated"]
    assert row["real_seconds"] == pytest.approx(1.6 + 18 * 0.6 / 9)
    assert row["openrlhf_seconds"] == pytest.approx(9.0) and row["from_layers"] == [9, 18]
    assert row["ratio"] == pytest.approx(2.8 / 9)
    aims = {a["aim"]: a["met"] for a in results["aims"]}
    assert aims["Qwen3-4B: step seconds, real/openrlhf, extrapolated from [9, 18] layers"] is True
    assert "not run" in words


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    results = results_of([])
    assert "not measured" in gpu_report.write_report(results, tmp_path)


# -- the profile -------------------------------------------------------------------------------------------------------


def event(key: str, device: str, us: float, count: int = 1, annotation: bool = False) -> SimpleNamespace:
    times = {"self_device_time_total": us, "self_cpu_time_total": us}
    return SimpleNamespace(
        key=key, device_type=f"DeviceType.{device}", count=count, is_user_annotation=annotation, **times
    )


def test_kernels_are_told_from_calls_and_waits_are_counted() -> None:
    events = [
        event("gemm", "CUDA", 2e6, 7), event("flash", "CUDA", 1e6), event("span", "CUDA", 9e6, annotation=True),
        event("cudaStreamSynchronize", "CPU", 5e5, 3), event("aten::item", "CPU", 1.0, 2),
        event("cudaLaunchKernel", "CPU", 1e3, 100), event("aten::mm", "CPU", 2e6),
    ]  # fmt: skip
    found = summary(events, on_gpu=True)
    assert found["kernel_seconds"] == 3.0
    assert [k["name"] for k in found["kernels"]] == ["gemm", "flash"] and found["kernels"][0]["ms"] == 2000.0
    assert found["syncs"] == {"cudaStreamSynchronize": 3, "aten::item": 2}
    assert found["calls"] == {"cudaLaunchKernel": {"calls": 100, "ms": 1.0}}
    words = text({**found, "step_seconds": 4.0, "python_seconds": 1.0})
    assert "75%" in words and "gemm" in words and "100 calls" in words


def test_unknown_models_and_centres_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--models", "9b"], ["--centre", "1,2"], ["--prompts", "a"]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)
    assert "32b" in capsys.readouterr().err
    assert gpu.parse(["--models", "8b,32b"]).models == ["8b", "32b"]
