"""The warm-up on the real stack: every method on a tiny model, its loss against transformers' own, two ranks with
ZeRO 3 and adapters, and a run that goes on after a signal and after a fault."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_openrlhf.export.settings import JudgeSettings
from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, write_rows

pytestmark = pytest.mark.integration
ROWS = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m/, sft.jsonl, eval.jsonl, and labels.jsonl, whose every second row has no response."""
    path = tmp_path_factory.mktemp("warmup")
    torch.set_num_threads(1)
    make_judge(path / "m", steps=0)
    rng, rows = random.Random(0), make_rows(ROWS, seed=7)
    for row in rows:
        words = str(row["prompt"]).split()[:-1]
        row["response"] = f"because {' '.join(rng.choice(words) for _ in range(2))} {ANCHOR}{row['label']}"
    write_rows(path / "sft.jsonl", rows)
    write_rows(path / "labels.jsonl", [{**row, "response": None} if i % 2 else row for i, row in enumerate(rows)])
    write_rows(path / "eval.jsonl", make_rows(40, seed=8))
    return path


def command(folder: Path, out: Path, *flags: str, data: str = "sft.jsonl") -> list[str]:
    words = [sys.executable, "-m", "real_openrlhf.train_warmup", "--actor.model_name_or_path", str(folder / "m")]
    words += ["--data.prompt_dataset", str(folder / data), "--data.max_len", "40", "--rollout.max_new_tokens", "16"]
    words += [
        "--real.anchor",
        ANCHOR,
        "--real.device",
        "cpu",
        "--actor.adam.lr",
        "3e-3",
        "--actor.lr_scheduler",
        "constant",
    ]
    words += ["--actor.lr_warmup_ratio", "0", "--train.batch_size", "16", "--train.num_episodes", "3"]
    return [*words, "--ckpt.output_dir", str(out), *flags]


def run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def lines(path: Path, phase: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in found if phase in (None, line.get("phase"))]


def reference(folder: Path) -> tuple[float, float]:
    """transformers' cross-entropy of all responses, and the mean squared error of E[score], of the start."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "m")
    model = AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float64).eval()
    labels = torch.tensor(tokenizer.convert_tokens_to_ids(list("12345")))
    nats, tokens, squared = 0.0, 0, 0.0
    rows = lines(folder / "sft.jsonl")
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        predicted = logprobs[len(prompt) - 1 : -1]
        nats -= float(predicted.gather(1, torch.tensor(response)[:, None]).sum())
        tokens += len(response)
        # The score is the last but one token of the response.
        expected = float(predicted[-2].exp()[labels] @ torch.arange(1.0, 6.0, dtype=torch.float64))
        squared += (expected - row["label"]) ** 2
    return nats / tokens, squared / len(rows)


@pytest.mark.parametrize("method", ["sft", "raft"])
def test_the_loss_is_transformers_own_and_falls(folder: Path, tmp_path: Path, method: str) -> None:
    """The first update is on all rows at once, so that its loss is the mean over the whole file."""
    one = str(ROWS)
    flags = ["--warmup.method", method, "--train.batch_size", one, "--train.micro_batch_size", "50"]
    run(command(folder, tmp_path / "out", *flags, "--train.num_episodes", "30"))
    train = lines(tmp_path / "out/metrics.jsonl", "train")
    nats, squared = reference(folder)
    assert train[0]["loss/cross_entropy"] == pytest.approx(nats, rel=1e-5)
    assert train[0]["loss/squared_error"] == pytest.approx(squared if method == "raft" else 0.0, rel=1e-4)
    assert train[-1]["loss/total"] < 0.8 * train[0]["loss/total"]
    settings = JudgeSettings.load(tmp_path / "out/model")
    assert (settings.step, settings.preset, settings.anchors) == (30, "warmup", (ANCHOR,))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert saved.generation_config.eos_token_id == AutoTokenizer.from_pretrained(folder / "m").eos_token_id


@pytest.mark.slow
def test_tract_on_rows_some_of_which_have_no_feedback(folder: Path, tmp_path: Path) -> None:
    """Stage 1 completes the data, its judge writes the feedback of stage 2, which begins from the start again."""
    out = tmp_path / "out"
    flags = [
        "--warmup.method",
        "tract",
        "--warmup.feedback",
        "missing",
        "--real.lam",
        "3",
        "--train.num_episodes",
        "20",
    ]
    told = run(command(folder, out, *flags, data="labels.jsonl"))
    assert f"done: the judge is in {out}/model" in told
    first, second = lines(out / "stage_1/feedback.jsonl")[1:], lines(out / "feedback.jsonl")[1:]
    assert [line["row"] for line in first] == list(range(1, ROWS, 2))
    assert [line["row"] for line in second] == list(range(ROWS))
    tokenizer = AutoTokenizer.from_pretrained(folder / "m")
    data = lines(folder / "labels.jsonl")
    for line in [*first, *second]:
        text = tokenizer.decode(line["response_ids"])
        assert text.endswith(f"{ANCHOR}{data[line['row']]['label']} </s>")
    # A judge that was trained writes the anchor by itself, a random one hardly ever.
    by_itself = [sum(line["ended"] == "anchor" for line in part) / len(part) for part in (first, second)]
    assert by_itself[1] > by_itself[0]
    for stage in (out / "stage_1", out):
        train = lines(stage / "metrics.jsonl", "train")
        assert len(train) == 160 and train[-1]["loss/total"] < train[0]["loss/total"]
    # Both stages begin with the same model. Of stage 2 the same rows are in the first update, with other feedback.
    first_errors = [lines(stage / "metrics.jsonl", "train")[0]["policy/abs_error"] for stage in (out / "stage_1", out)]
    assert abs(first_errors[0] - first_errors[1]) < 0.5


def test_two_ranks_with_zero_3_and_adapters(folder: Path, tmp_path: Path) -> None:
    """The same losses as one rank without sharding, and an adapter beside the merged weights."""
    lora = ["--ds.lora.rank", "4", "--actor.gradient_checkpointing_enable", "--train.max_steps", "3"]
    run(command(folder, tmp_path / "one", *lora, "--ds.zero_stage", "2"))
    run(command(folder, tmp_path / "two", *lora, "--ds.zero_stage", "3", "--actor.num_gpus_per_node", "2"))
    one, two = (lines(tmp_path / name / "metrics.jsonl", "train") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("loss/cross_entropy", "loss/squared_error", "policy/grad_norm", "policy/abs_error"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name
    assert (tmp_path / "two/model/adapter/adapter_config.json").is_file()


@pytest.mark.faults
def test_it_goes_on_after_a_signal_and_after_a_fault(folder: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle, the same command again, and its policy killed: bit for bit the weights of an unbroken run.

    After the signal the command is needed again; after the kill the run starts again by itself.
    """
    flags = ["--train.full_determinism_enable", "--train.num_episodes", "60", "--ckpt.load", "auto"]
    run(command(folder, tmp_path / "whole", *flags))
    words, metrics = command(folder, tmp_path / "broken", *flags), tmp_path / "broken/metrics.jsonl"
    with once_at(words, metrics, 41) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 85
    stopped_at = lines(metrics, "train")[-1]["step"]
    assert 40 <= stopped_at < 440
    with once_at(words, metrics, stopped_at + 20) as process:
        (policy,) = (p for p in psutil.Process(process.pid).children(recursive=True) if is_policy(p))
        policy.kill()
        assert process.wait(timeout=400) == 0
    (fault,) = lines(tmp_path / "broken/warnings.jsonl")
    assert fault["watch"] == "fault" and fault["step"] == stopped_at and f"step_{stopped_at}" in fault["message"]
    steps = [line["step"] for line in lines(metrics, "train")]
    assert steps == list(range(1, 481))
    whole, broken = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@contextmanager
def once_at(words: list[str], metrics: Path, step: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command in the background, once it has made so many steps."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    try:
        deadline = time.monotonic() + 500
        while not (metrics.is_file() and lines_so_far(metrics) >= step):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()


def is_policy(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::RealPolicyActor")
    except psutil.Error:
        return False


def lines_so_far(path: Path) -> int:
    return path.read_bytes().count(b'"phase": "train"')
