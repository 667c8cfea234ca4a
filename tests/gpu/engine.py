"""vLLM with this project's engine options, nvcc hidden: agreement with the policy, score log-probs, sleep, throughput.

Takes SmolLM2-135M from the folder $SMOLLM2 (examples/stsb/get_model.py), or random weights of its shape. Each engine is
a child (`python -m tests.gpu.engine --child ...`), so that one that fails hides nothing of the other; ENGINES=4
asks three more (`ENGINES` below), each of which takes as long again.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.gpu.harness import DEVICE, ON_GPU, Report, run
from tests.gpu.update import without_a_compiler

READ = [4, 5, 6, 7, 8]
# Name, logits in fp32, sequences at a time, sleeps, head tied to the embedding (random weights only).
ENGINES = (
    ("fp32 head, 512 sequences", True, 512, True, True),
    ("bf16 head, 128 sequences", False, 128, False, True),
    ("fp32 head, 1024 sequences, untied", True, 1024, False, False),
    ("bf16 head, 512 sequences, untied", False, 512, False, False),
)
# Prompts and tokens that a rollout writes; rollouts per prompt.
ROLLOUTS, RESPONSE, SAMPLES = (512, 128, 16) if ON_GPU else (4, 8, 2)
TEXT = (
    "You are a fair judge. Read the two sentences and say how similar their meanings are, from 0 to 5. First write one "
    "or two sentences of feedback: which facts do both state, what does only one of them state? Sentence one: a man "
    "with a red hat is riding a brown horse along the beach while his dog runs beside them. Sentence two: someone "
    "rides a horse on the sand near the sea. Both speak of riding a horse by the water; the hat and the dog are "
    "missing in the second. So the overall score is 3"
)


def sequences(tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """A real text, and parts of it; random tokens without a tokenizer."""
    if tokenizer is None:
        rng = random.Random(0)
        return [[rng.randrange(9, vocabulary) for _ in range(n)] for n in (150, 97, 40)]
    ids = tokenizer(TEXT)["input_ids"]
    return [ids, ids[20:], ids[:60]]


def gaps(values: list[float], wanted: list[float]) -> list[float]:
    difference = (torch.tensor(values) - torch.tensor(wanted)).abs()
    return [float(difference.mean()), float(difference.max())]


def policy_logprobs(path: str, rows: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """[L - 1, V] on the CPU: of the model that the policy trains, its output layer in fp32 as there."""
    from transformers import AutoModelForCausalLM

    from real_openrlhf.actors.policy.model import accept_packed_rows

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(DEVICE).eval()
    accept_packed_rows(model)
    tables = []
    with torch.no_grad():
        for ids in rows:
            logits = model(torch.tensor([ids], device=DEVICE), use_cache=False).logits[0, :-1]
            assert logits.dtype == torch.float32
            tables.append(logits.log_softmax(-1).cpu())
    return tables


def child(path: str, fp32_head: bool, max_num_seqs: int, sleeps: bool) -> dict[str, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from real_openrlhf.common.device import Device

    device = Device(name=DEVICE, dtype_name="bf16")
    os.environ.update(device.engine_env())
    import vllm
    from transformers import AutoConfig, AutoTokenizer

    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(path) if (Path(path) / "tokenizer.json").is_file() else None
    rows = sequences(tokenizer, vocabulary)
    found: dict[str, Any] = {}
    start = time.perf_counter()
    llm = vllm.LLM(
        path,
        dtype=device.vllm_dtype,
        enforce_eager=not ON_GPU,
        gpu_memory_utilization=0.3,
        max_model_len=1024,
        skip_tokenizer_init=True,
        enable_sleep_mode=sleeps and ON_GPU,
        seed=0,
        logprobs_mode="raw_logprobs",
        worker_extension_cls="real_openrlhf.actors.engine.vllm_worker.SyncWorkerExtension",
        **device.engine_options(1024, max_num_seqs=max_num_seqs, fp32_head=fp32_head),
    )
    found["start, s"] = time.perf_counter() - start
    scoring = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in rows], scoring, use_tqdm=False)
    engine = [
        one[token].logprob
        for ids, output in zip(rows, outputs, strict=True)
        for token, one in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    drawing = vllm.SamplingParams(
        n=4, temperature=1.0, max_tokens=16, logprob_token_ids=READ, seed=1, detokenize=False, ignore_eos=True
    )
    prompts = [{"prompt_token_ids": ids[:n]} for ids, n in zip(rows, (60, 30, 9), strict=True)]
    drawn = llm.generate(prompts, drawing, use_tqdm=False)
    texts, read = [], []
    for prompt, output in zip(prompts, drawn, strict=True):
        for sample in output.outputs:
            texts.append(([*prompt["prompt_token_ids"], *sample.token_ids], len(prompt["prompt_token_ids"])))
            read.append(
                [[one[i].logprob for i in (*READ, token)] for token, one in zip(sample.token_ids, sample.logprobs)]
            )
    many = vllm.SamplingParams(
        n=SAMPLES, temperature=1.0, max_tokens=RESPONSE, logprob_token_ids=READ, detokenize=False, ignore_eos=True
    )
    every = [{"prompt_token_ids": [9 + i, *rows[0][: min(150, len(rows[0]))]]} for i in range(ROLLOUTS // SAMPLES)]
    for attempt in ("first", "second"):
        start = time.perf_counter()
        llm.generate(
            [{"prompt_token_ids": [*p["prompt_token_ids"], len(attempt)]} for p in every], many, use_tqdm=False
        )
        seconds = time.perf_counter() - start
        found[f"{ROLLOUTS} rollouts of {RESPONSE} tokens, {attempt} time: rollouts/s"] = ROLLOUTS / seconds
    if sleeps and ON_GPU:
        free = torch.cuda.mem_get_info()[0]
        for cycle in (1, 2):
            llm.sleep(level=1)
            found[f"sleep {cycle} freed, GiB"] = (torch.cuda.mem_get_info()[0] - free) / 2**30
            llm.wake_up()
            again = llm.generate(prompts, drawing, use_tqdm=False)
            same = [a.token_ids for o in again for a in o.outputs] == [a.token_ids for o in drawn for a in o.outputs]
            found[f"after waking {cycle}, the same tokens"] = same
    found["peak GiB outside of torch's pool"] = 0.0 if not ON_GPU else (
        torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    ) / 2**30  # fmt: skip
    for name, dtype in (("the policy's bf16", torch.bfloat16), ("fp32", torch.float32)):
        tables = policy_logprobs(path, rows, dtype)
        wanted = [float(t[i, token]) for ids, t in zip(rows, tables) for i, token in enumerate(ids[1:])]
        found[f"log-prob gap to {name}, mean and max"] = gaps(engine, wanted)
        found[f"spread of log-probs, {name}"] = float(torch.tensor(wanted).std())
    tables = policy_logprobs(path, [ids for ids, _ in texts], torch.float32)
    mine, theirs = [], []
    for (ids, n), table, sample in zip(texts, tables, read, strict=True):
        for t, values in enumerate(sample):
            mine += values
            theirs += [float(table[n + t - 1, i]) for i in (*READ, ids[n + t])]
    found["log-probs of chosen tokens at every position: gap to fp32, mean and max"] = gaps(mine, theirs)
    return found


def make_model(folder: str, *, tied: bool) -> str:
    """Random weights of SmolLM2-135M's shape."""
    from tests.gpu.small_models import random_model

    sizes = dict(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, vocabulary=49_152)
    tiny = dict(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, vocabulary=512)
    path = Path(folder) / ("tied" if tied else "untied")
    if not path.exists():
        random_model(**(sizes if ON_GPU else tiny), tied=tied).to(torch.bfloat16).save_pretrained(path)
    return str(path)


def check(report: Report) -> None:
    from real_openrlhf.common.device import SYNC_TOLERANCE

    with tempfile.TemporaryDirectory() as folder:
        real = os.environ.get("SMOLLM2")
        report.figure("model", "SmolLM2-135M" if real else "random weights")
        for name, head, sequences_at_once, sleeps, tied in ENGINES[: int(os.environ.get("ENGINES") or 1)]:
            path = real or make_model(folder, tied=tied)
            command = [
                sys.executable,
                "-m",
                "tests.gpu.engine",
                "--child",
                path,
                str(int(head)),
                str(sequences_at_once),
            ]
            done = subprocess.run(
                [*command, str(int(sleeps))], env=without_a_compiler(), capture_output=True, text=True, timeout=150
            )
            if done.returncode:
                raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr)[-6000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            for key, value in found.items():
                report.figure(f"{name}: {key}", value)
            mean = found["log-prob gap to the policy's bf16, mean and max"][0]
            report.expect(mean < SYNC_TOLERANCE["bf16"], f"{name}: the agreement check would refuse honest weights")
            exact = found["log-probs of chosen tokens at every position: gap to fp32, mean and max"][0]
            report.expect(exact < SYNC_TOLERANCE["bf16"], f"{name}: log-probs of chosen tokens are not the model's")
            if sleeps and ON_GPU:
                report.expect(found["sleep 2 freed, GiB"] > 1, "sleep gave no memory back")
                report.expect(found["after waking 2, the same tokens"], "an engine that woke writes other tokens")


if __name__ == "__main__":
    if "--child" in sys.argv:
        path, head, at_once, sleeps = sys.argv[sys.argv.index("--child") + 1 :]
        print(json.dumps(child(path, bool(int(head)), int(at_once), bool(int(sleeps)))))
    else:
        run("engine", "Does an engine start without nvcc, agree with the policy, sleep, and fill the card?", check)
