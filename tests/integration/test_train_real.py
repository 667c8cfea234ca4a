"""The whole stack on a tiny judge: one rank and one engine on its own Ray cluster, then two ranks and two engines by
`ray job submit`, which must change nothing but the time it takes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ray.job_submission import JobStatus, JobSubmissionClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.algo.objectives import OBJECTIVES, SUPERVISED
from real_openrlhf.export.settings import JudgeSettings
from real_openrlhf.run.ray_token import own_token
from tests.helpers.tiny_judge import ANCHOR

pytestmark = pytest.mark.integration
BIN = Path(sys.executable).parent
# Every request has its own seed, so that rollouts do not depend on the number of engines. A large epsilon: where
# a gradient is rounding noise, Adam would turn the noise into a full step.
SAME = ["--train.full_determinism_enable", "--actor.adam.eps", "1e-4", "--ckpt.best_metric_key", "none"]
HEAD, ROLLOUTS = "untied", 32
# Keys in the environment of a run, which nothing that it writes may hold.
KEYS = {name: f"{name.lower()}-0123456789abcdef" for name in ("WANDB_API_KEY", "HF_TOKEN", "OTHER_API_KEY")}


def flags(judges: Path, head: str, out: Path, *more: str) -> list[str]:
    return [
        "--actor.model_name_or_path",
        str(judges / head),
        "--data.prompt_dataset",
        str(judges / "train.jsonl"),
        "--eval.dataset",
        str(judges / "eval.jsonl"),
        *["--data.max_len", "48", "--rollout.max_new_tokens", "12", "--rollout.batch_size", "8"],
        *["--rollout.n_samples_per_prompt", "4", "--train.micro_batch_size", "8", "--train.max_steps", "2"],
        *[
            "--eval.steps",
            "1",
            "--actor.adam.lr",
            "1e-3",
            "--real.beta",
            "1",
            "--real.device",
            "cpu",
            "--logger.samples",
            "2",
        ],
        "--real.anchor",
        ANCHOR,
        "--ckpt.output_dir",
        str(out),
        *more,
    ]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_run(judges: Path, out: Path) -> None:
    metrics = read_lines(out / "metrics.jsonl")
    train = [m for m in metrics if m["phase"] == "train"]
    evals = [m for m in metrics if m["phase"] == "eval"]
    assert [m["step"] for m in train] == [1, 2]
    assert [(m["step"], m["weight_version"]) for m in evals] == [(0, 0), (1, 1), (2, 2)]
    for m in train:
        # Engine and policy compute the same: right after the sync, and on the rollouts themselves.
        assert m["sync/logprob_mean"] < 1e-4
        assert m["sync/logprob_max"] < 1e-2
        assert m["rollout_gap/logprob_max"] < 1e-2
        assert m["policy/grad_norm"] > 0
        assert m["sampling/kept"] == 8
        # The distribution that came with the rollouts is the one that the policy computes.
        assert abs(m["policy/mass"] - m["score/mass"]) < 0.2
        assert {"loss/cot", "loss/squared_error", "loss/likelihood", "reward/mean", "seconds/generate"} <= set(m)
    check_export_against_last_evaluation(judges, out)
    samples = read_lines(out / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2}
    assert "judge" in samples[0]["prompt_tail"]


def check_export_against_last_evaluation(judges: Path, out: Path) -> None:
    """The exported folder, in transformers, gives the distributions that the engines had after the last sync."""
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(judges / HEAD, dtype=torch.float32)
    assert max(float((a - b).abs().max()) for a, b in zip(model.parameters(), start.parameters())) > 5e-4
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    prompts = read_lines(judges / "eval.jsonl")
    rows = [r for r in read_lines(out / "eval" / "step_2.jsonl") if r["expected"] is not None]
    assert len(rows) > 30
    labels = tokenizer.convert_tokens_to_ids(list("12345"))
    for row in rows[:10]:
        words = row["text"].split()
        thought = words[: len(words) - 1 - words[::-1].index("score") + 1]
        ids = tokenizer(" ".join([str(prompts[row["row"]]["prompt"]), *thought]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probs = model(ids).logits[0, -1].softmax(-1)[labels]
        torch.testing.assert_close(torch.tensor(row["distribution"]), probs, rtol=0, atol=1e-4)
        assert row["expected"] == pytest.approx(float(probs @ torch.arange(1.0, 6.0)), abs=5e-4)


@pytest.fixture(scope="module")
def narrow(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, one engine, an evaluator with its own engine; the run starts its own cluster; ZeRO-2."""
    out = tmp_path_factory.mktemp("narrow") / "run"
    command = [sys.executable, "-m", "real_openrlhf.train_real", *flags(judges, HEAD, out, *SAME)]
    command += ["--eval.engine", "own"]
    command[command.index("--logger.samples") + 1] = str(ROLLOUTS)
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env={**os.environ, **KEYS})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (out.parent / "terminal").write_text(done.stdout + done.stderr)
    return out


def test_no_key_is_in_what_a_run_writes(narrow: Path) -> None:
    """Records, the page, logs, the libraries' log, the exported judge, the terminal."""
    files = [path for path in narrow.parent.rglob("*") if path.is_file()]
    expected = {"terminal", "metrics.jsonl", "run_config.json", "report.html", "model.safetensors"}
    assert expected <= {path.name for path in files}
    holding = [(path.name, key) for path in files for key, value in KEYS.items() if value.encode() in path.read_bytes()]
    assert holding == []


@pytest.mark.slow
def test_the_same_command_gives_the_same_run_also_beside_other_load(judges: Path, tmp_path: Path) -> None:
    """Bit for bit: what was sampled, what was learned, which weights were the best."""
    # Nicer than the run, so that it still ends soon.
    spin = [sys.executable, "-c", "import os\nos.nice(10)\nwhile True: pass"]
    busy: list[subprocess.Popen[bytes]] = []
    for name, load in (("one", 0), ("two", 2)):
        busy += [subprocess.Popen(spin) for _ in range(load)]
        try:
            command = [sys.executable, "-m", "real_openrlhf.train_real"]
            command += [*flags(judges, HEAD, tmp_path / name), "--train.full_determinism_enable"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=580)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("samples.jsonl", "warnings.jsonl", *(f"eval/step_{step}.jsonl" for step in (0, 1, 2))):
        assert (one / name).read_text() == (two / name).read_text(), name
    clocks = ("seconds/", "speed/", "sync/transfer_seconds", "sync/check_seconds", "time")
    for mine, theirs in zip(read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith(clocks)} == {
            k: v for k, v in theirs.items() if not k.startswith(clocks)
        }
    assert (one / "model/model.safetensors").read_bytes() == (two / "model/model.safetensors").read_bytes()
    evaluations = [m for m in read_lines(one / "metrics.jsonl") if m["phase"] == "eval"]
    assert "eval/change/reward" not in evaluations[0] and "eval/change/reward_low" in evaluations[2]
    best = max(evaluations, key=lambda m: m["eval/expected/pearson"])["step"]
    assert JudgeSettings.load(one / "model").step == best
    card = (one / "model/README.md").read_text(encoding="utf-8")
    assert f"These are the weights of step {best}, the best of 3 evaluations by expected/pearson" in card
    assert not list(one.glob("best_step_*"))


OTHERS = [name for name in OBJECTIVES if name not in ("real", *SUPERVISED)]


@pytest.fixture(scope="module")
def others(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of each other objective, a folder each, in one process: one after the other on the same engine."""
    folder = tmp_path_factory.mktemp("others")
    more = ("--ckpt.best_metric_key", "none", "--real.objective")
    runs = [flags(judges, HEAD, folder / objective, *more, objective) for objective in OTHERS]
    command = [sys.executable, "-m", "tests.helpers.kept_runs", json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("objective", OTHERS)
def test_every_other_objective_trains(judges: Path, others: Path, objective: str) -> None:
    """The terms that an objective has are the ones that are not zero."""
    run = others / objective
    check_run(judges, run)
    train = [m for m in read_lines(run / "metrics.jsonl") if m["phase"] == "train"]
    learns_score = objective in ("jepo", "term2_only")
    for m in train:
        assert (m["loss/likelihood"] != 0) == learns_score
        assert (m["loss/squared_error"] != 0) == (objective == "term2_only")
        assert (m["advantage/abs_mean"] > 0) == (objective != "term2_only")
    assert f"the objective `{objective}`" in (run / "model/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "reference group"])
def test_with_a_kl(judges: Path, tmp_path: Path, lora: bool) -> None:
    """Adapters pushed merged, with the policy as its own reference; or all parameters, with a reference group."""
    more = ["--algo.kl.init_coef", "0.1", *(["--ds.lora.rank", "4", "--actor.adam.lr", "1e-2"] if lora else [])]
    command = [sys.executable, "-m", "real_openrlhf.train_real", *flags(judges, "untied", tmp_path / "run", *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_run(judges, tmp_path / "run")
    first, second = (m for m in read_lines(tmp_path / "run" / "metrics.jsonl") if m["phase"] == "train")
    # The policy begins as its reference.
    assert abs(first["policy/kl"]) < 1e-8 < second["policy/kl"]
    assert first["seconds/reference"] > 0
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors").exists() == lora


@contextlib.contextmanager
def ray_head(folder: Path) -> Iterator[str]:
    """A separate Ray head node that asks for a token, ended by its process group; yields the job server's address."""
    port, dashboard = free_port(), free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--port", str(port), "--num-cpus", "4"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--disable-usage-stats"]
    command += ["--temp-dir", str(folder), "--node-ip-address", "127.0.0.1"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{address}/api/version", headers=token)
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, "the Ray head did not answer in time"
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
                break
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def wide(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two engines that the evaluator borrows; ZeRO-3, four micro-batches per rank.

    Submitted from a checkout to a cluster with a token, stopped by `ray job stop` in its first step, submitted again.
    """
    out = tmp_path_factory.mktemp("wide") / "run"
    train = [sys.executable, "-m", "real_openrlhf.train_real", *flags(judges, HEAD, out, *SAME), "--ckpt.load", "auto"]
    train += ["--actor.num_gpus_per_node", "2", "--vllm.num_engines", "2", "--ds.zero_stage", "3"]
    train += ["--actor.gradient_checkpointing_enable"]
    train[train.index("--train.micro_batch_size") + 1] = "4"
    train[train.index("--logger.samples") + 1] = str(ROLLOUTS)
    # Ray's sockets live under its temp dir, whose path must be short.
    with own_token(), tempfile.TemporaryDirectory(prefix="r") as short, ray_head(Path(short)) as address:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=60)
        submit = [sys.executable, "-m", "real_openrlhf.submit", "--address", address, "--stop_wait", "300"]
        submit += ["--working_dir", str(Path(__file__).parents[2])]
        begin = [*submit, "--submission_id", "first", "--no_wait", "--", *train]
        subprocess.run(begin, check=True, capture_output=True, timeout=120)
        client = JobSubmissionClient(address)
        wait_until(lambda: any((out / "eval").glob("*")) or client.get_job_status("first").is_terminal())
        client.stop_job("first")  # what `ray job stop` calls; the first step is going on
        wait_until(lambda: client.get_job_status("first").is_terminal())
        logs = client.get_job_logs("first")
        assert client.get_job_status("first") == JobStatus.STOPPED, logs[-4000:]
        assert "SIGTERM: stopped after step 1" in logs
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]

        done = subprocess.run([*submit, "--", *train], capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "resumed from" in done.stdout
        wrong = subprocess.run([*submit, "--", *train, "--eval.step", "1"], capture_output=True, text=True, timeout=580)
        assert wrong.returncode == 2 and "--eval.steps" in wrong.stdout, wrong.stdout[-4000:] + wrong.stderr[-2000:]
    return out


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_own_cluster(judges: Path, narrow: Path) -> None:
    check_run(judges, narrow)
    assert (narrow / "model" / "README.md").read_text(encoding="utf-8").count("expected") > 0


def test_ray_job_submit(judges: Path, wide: Path) -> None:
    check_run(judges, wide)


def test_width_changes_nothing(narrow: Path, wide: Path) -> None:
    """The same rollouts, losses and weights, whatever the number of ranks, engines and micro-batches."""
    one, two = (read_lines(out / "samples.jsonl") for out in (narrow, wide))
    assert len(one) == len(two) == 2 * ROLLOUTS
    evaluations = [f"eval/step_{step}.jsonl" for step in (0, 1, 2)]
    for name in evaluations:
        one, two = [*one, *read_lines(narrow / name)], [*two, *read_lines(wide / name)]
    for mine, theirs in zip(one, two):
        # One token per word: the same text is the same ids.
        assert [mine[k] for k in ("row", "text", "label")] == [theirs[k] for k in ("row", "text", "label")]
        assert (mine["expected"] is None) == (theirs["expected"] is None)
        if mine["expected"] is not None:
            assert mine["distribution"] == pytest.approx(theirs["distribution"], abs=1e-4)
    one, two = ([m for m in read_lines(out / "metrics.jsonl") if m["phase"] == "train"] for out in (narrow, wide))
    for mine, theirs in zip(one, two, strict=True):
        terms = [name for name in mine if name.startswith("loss/")]
        assert {"loss/cot", "loss/squared_error", "loss/likelihood", "loss/total"} <= set(terms)
        for name in [*terms, "reward/mean", "policy/expected_score", "policy/mass"]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (mine["step"], name)
        norms = [name for name in mine if name.startswith("logit_grad_norm/")]
        for name in [*norms, "policy/grad_norm"]:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["step"], name)
    first, second = (load_file(out / "model" / "model.safetensors") for out in (narrow, wide))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_one_step_ahead(judges: Path, tmp_path: Path) -> None:
    """Rollouts from the second step on are one version late, and the loss corrects for it."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "real_openrlhf.train_real", *flags(judges, "tied", out), "--train.async_enable"]
    command[command.index("--train.max_steps") + 1] = "3"
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    train = [m for m in read_lines(out / "metrics.jsonl") if m["phase"] == "train"]
    assert [m["rollouts/age"] for m in train] == [0.0, 1.0, 1.0]
    assert {s["weight_version"] for s in read_lines(out / "samples.jsonl")} == {0, 1}
    assert all(m["sync/logprob_mean"] < 1e-4 for m in train)
    gaps = [m["rollout_gap/logprob_mean"] for m in train]
    assert gaps[0] < 1e-4 < 1e-3 < min(gaps[1:]), gaps
