"""The benchmark's contestants: they compute what they should, and the same where it is the same."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from examples.benchmark.protocol import CONTESTANTS, Case
from examples.benchmark.rollouts import SCALE, make_group
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import Group, group_scores

pytestmark = pytest.mark.integration

SEED, VOCABULARY = 5, 300
CASES = {
    "micro": Case(prompt=40, response=12, samples=4, micro_batch=2),
    "whole": Case(prompt=40, response=12, samples=4, micro_batch=4, gradient_checkpointing=True),
}
PHASES = {
    "real": {"forward", "backward", "optimizer", "experience"},
    "openrlhf": {"old_logprobs", "forward", "backward", "optimizer", "experience"},
    "authors": {"old_logprobs", "expected_score", "forward", "backward", "optimizer", "experience"},
}


class Process:
    """A worker and its pipes."""

    def __init__(self, contestant: str, model: Path) -> None:
        command = [sys.executable, "-m", "examples.benchmark.worker", "--contestant", contestant, "--model", str(model)]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended with {self.process.wait(10)}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def ask(self, case: Case) -> dict[str, Any]:
        self.tell(op="step", case=case.to_json(), seed=SEED)
        return self.read()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen3 with random weights, tied head, grouped queries."""
    folder = tmp_path_factory.mktemp("benchmark") / "model"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=True,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(model: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """By contestant: "ready", the steps of CASES, and for one of them what follows a case that fails."""
    with ExitStack() as stack:
        workers = {}
        for name in CONTESTANTS:
            workers[name] = Process(name, model)
            stack.callback(workers[name].process.kill)
        found: dict[str, dict[str, Any]] = {}
        for name, worker in workers.items():
            found[name] = {"ready": worker.read()}
            found[name] |= {case: worker.ask(CASES[case]) for case in CASES}
        last = workers["authors"]
        pid = last.process.pid
        found["authors"]["failed"] = last.ask(Case(prompt=40, response=12, samples=4, micro_batch=3))
        found["authors"]["after"] = last.ask(CASES["micro"])
        assert last.process.pid == pid
        for worker in workers.values():
            worker.tell(op="quit")
            assert worker.process.wait(60) == 0
        yield found


def reference(model: Path, group: Group) -> dict[str, float]:
    """Plain torch on separate rows: the sum of log-probs, and OpenRLHF's and REAL's loss and norm of its gradient."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    responses = torch.stack([r.token_ids for r in group.rollouts])
    k, length = responses.shape
    logits = network(torch.cat([group.prompt_ids.expand(k, -1), responses], 1)).logits[:, -length - 1 : -1]
    table = logits.log_softmax(-1)
    logprobs = table.gather(-1, responses[..., None])[..., 0]
    target = SCALE.target(group.label)
    coefficients = RealObjective()(group_scores(group, SCALE.tensor(), target))

    rewards = coefficients.rewards.clamp(-10, 10)
    rloo = rewards - (rewards.sum() - rewards) / (k - 1)
    stock = -(rloo.float()[:, None] * logprobs).sum() / (k * length)

    position = length - 2
    of_scores = table[:, position, list(range(3, 8))]
    expected = (of_scores.exp() * torch.arange(1.0, 6.0)).sum(-1)
    first = -(coefficients.cot.float() * logprobs[:, :position].sum(1)).mean()
    second = ((expected - group.label) ** 2 - of_scores[:, int(group.label) - 1]).mean()
    real = first + 0.01 * second

    def norm(loss: torch.Tensor) -> float:
        grads = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        return math.sqrt(sum(float(g.double().square().sum()) for g in grads))

    return {
        "logprob_sum": float(logprobs.detach().sum()),
        "expected_score": float(expected.detach().mean()),
        "real_loss": float(real.detach()),
        "real_norm": norm(real),
        "stock_norm": norm(stock),
    }


def test_every_contestant_says_what_it_is(answers: dict[str, dict[str, Any]], model: Path) -> None:
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    for name in CONTESTANTS:
        ready = answers[name]["ready"]
        assert ready["ready"] is True
        assert ready["facts"]["parameters"] == parameters and ready["facts"]["vocabulary"] == VOCABULARY
        assert ready["facts"]["gradient_bytes"] == 4 * parameters and ready["facts"]["dtype"] == "fp32"
    assert answers["real"]["ready"]["overrides"] == []
    stock = "\n".join(answers["openrlhf"]["ready"]["overrides"])
    for word in ("setup_distributed", "RayActorGroup", "torch.cuda.current_device", "fp32", "cross_entropy", "sdpa"):
        assert word in stock


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_step_is_measured(answers: dict[str, dict[str, Any]], name: str, case: str) -> None:
    step = answers[name][case]
    assert "error" not in step, step
    assert step["contestant"] == name and step["case"] == CASES[case].to_json()
    assert set(step["seconds"]) == PHASES[name]
    assert all(seconds > 0 for seconds in step["seconds"].values())
    assert sum(step["seconds"].values()) == pytest.approx(step["total"])
    assert math.isfinite(step["loss"]) and step["peak_bytes"] == max(step["peaks"].values())
    assert set(step["peaks"]) == PHASES[name]


@pytest.mark.parametrize("case", list(CASES))
def test_contestants_compute_what_plain_torch_computes(
    answers: dict[str, dict[str, Any]], model: Path, case: str
) -> None:
    group = make_group(CASES[case], seed=SEED, vocabulary=VOCABULARY)
    want = reference(model, group)
    for name in CONTESTANTS:
        assert answers[name][case]["facts"]["logprob_sum"] == pytest.approx(want["logprob_sum"], rel=1e-5)
    for name in ("real", "authors"):
        step = answers[name][case]
        assert step["loss"] == pytest.approx(want["real_loss"], rel=1e-4)
        assert step["facts"]["grad_norm"] == pytest.approx(want["real_norm"], rel=1e-4)
        assert step["facts"]["expected_score"] == pytest.approx(want["expected_score"], rel=1e-4)
    # The advantages of a group add up to 0, and all responses are equally long.
    stock = answers["openrlhf"][case]
    assert stock["loss"] == pytest.approx(0.0, abs=1e-5)
    assert stock["facts"]["grad_norm"] == pytest.approx(want["stock_norm"], rel=1e-4)


def test_a_failure_is_answered_and_the_next_step_is_whole(answers: dict[str, dict[str, Any]]) -> None:
    error = answers["authors"]["failed"]["error"]
    assert "authors" in error and '"micro_batch": 3' in error and "must divide" in error
    again, before = answers["authors"]["after"], answers["authors"]["micro"]
    assert again["loss"] == pytest.approx(before["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_gpu_benchmark_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    """Two depths of a tiny model, both contestants, with a profile: the program is whole, its numbers say nothing."""
    shapes = ["--models", "tiny", "--prompts", "24", "--responses", "8", "--samples", "4", "--centre", "24,8,4"]
    command = [sys.executable, "-m", "examples.benchmark.gpu", "--device", "cpu", "--minutes", "5", "--layers", "1"]
    subprocess.run([*command, *shapes, "--profile", "--output_dir", str(tmp_path)], check=True, timeout=600)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [(r["contestant"], r["layers"]) for r in found["runs"]] == [
        ("real", 1), ("openrlhf", 1), ("real", 2), ("openrlhf", 2)
    ]  # fmt: skip
    for run in found["runs"]:
        assert run["failed"] == [] and {s["kind"] for s in run["steps"]} == {"centre", "memory"}, run
        assert len(run["steps"][0]["seconds"]) == 3
    assert [row["ratio"] > 0 for row in found["table"]] == [True, True]
    # Both computed the same log-probs of the same rollouts under the same weights.
    assert all(row["logprob_sum_gap"] < 1e-5 for row in found["table"])
    assert len(found["memory"]) == 2
    (whole,) = found["extrapolated"]
    assert whole["layers"] == 4 and whole["from_layers"] == [1, 2]
    assert "aten::mm" in (tmp_path / "profile-tiny.txt").read_text(encoding="utf-8")
    assert "not run" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
