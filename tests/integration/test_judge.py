"""The judge's backends on one model: vLLM and transformers in this process, and `vllm serve` over HTTP."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from scipy import stats

from real_openrlhf import evaluate
from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.tokenizer import load_tokenizer
from real_openrlhf.evals import command
from real_openrlhf.evals.report import load_run
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.resolve_settings import plain_settings
from real_openrlhf.judge.scoring import score_given, score_prompts
from real_openrlhf.judge.types import Judgement
from tests.helpers.reward_server import serve_until
from tests.helpers.tiny_judge import ANCHOR, make_rows, write_rows

pytestmark = pytest.mark.integration

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def stack(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """local, remote and plain: judges of one model, the last on transformers. What they started is ended by its id."""
    environment, folder = dict(os.environ), judges / "tied"
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "real_openrlhf.judge", "serve", "--model", str(folder), "--scale", "1-5"]
    command += ["--anchor", ANCHOR, "--device", "cpu", "--port", str(port), "--max_model_len", "64"]
    command += ["--max_new_tokens", str(NEW_TOKENS)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    family = [psutil.Process(server.pid)]
    settings = plain_settings(
        folder, load_tokenizer(str(folder)), scale="1-5", anchors=(ANCHOR,), max_new_tokens=NEW_TOKENS
    )
    try:
        # While the server starts.
        local = Judge(folder, settings=settings, backend="vllm", device="cpu", max_model_len=64)
        assert local.score_prompts(["fine sound clear judge"])[0].score is not None
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server, log)
        family += family[0].children(recursive=True)
        with Judge(folder, settings=settings, server=url) as remote:
            plain = Judge(folder, settings=settings, device="cpu", max_model_len=64)  # a small model on a CPU
            assert plain.backend_name == "transformers" and local.backend_name == "vllm"
            yield SimpleNamespace(local=local, remote=remote, plain=plain, model=load_model(folder), url=url)
        local.close()
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        os.environ.clear()
        os.environ.update(environment)
    assert not alive, log.read_text()[-2000:]


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(2400):
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def load_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_prompts(judge: Judge, n: int) -> list[Prompt]:
    made = []
    for row, values in enumerate(make_rows(n, seed=11)):
        text, ids = judge.settings.template.render(judge.tokenizer, values["prompt"])
        made.append(Prompt(token_ids=ids, label=math.nan, row=row, text=text))
    return made


@torch.no_grad()
def exact(stack: SimpleNamespace, prompt: Prompt, got: Judgement) -> torch.Tensor:
    """[5] log-probs of "1" to "5" after the prompt and the response up to the score."""
    logits = stack.model(torch.tensor([[*prompt.token_ids, *got.feedback_ids]])).logits[0, -1]
    return logits.double().log_softmax(-1)[stack.local.tokenizer.convert_tokens_to_ids(list("12345"))]


def greedy(new_tokens: int) -> Sampling:
    return Sampling(n=1, temperature=0.0, top_p=1.0, max_new_tokens=new_tokens, seed=0)


@pytest.mark.parametrize("new_tokens", [NEW_TOKENS, 2], ids=["free", "forced"])
def test_all_backends_give_the_exact_distribution(stack: SimpleNamespace, new_tokens: int) -> None:
    """Two tokens leave no room for a score: every one is forced."""
    prompts = make_prompts(stack.local, 24)
    sampling, reader = greedy(new_tokens), stack.local.reader
    answers = {}
    for name in ("local", "remote", "plain"):
        answers[name] = score_prompts(getattr(stack, name).backend, prompts, sampling, reader=reader)
        n_read = 0
        for prompt, (got,) in zip(prompts, answers[name]):
            if got.position is None:
                continue
            n_read += 1
            want = exact(stack, prompt, got)
            torch.testing.assert_close(torch.tensor(got.label_logprobs, dtype=torch.float64), want, atol=1e-4, rtol=0)
            assert got.expected == pytest.approx(float(want.exp() @ torch.arange(1.0, 6.0).double()), abs=1e-3)
            assert got.forced == (new_tokens == 2)
        assert n_read >= 20
    # On the feedback of the one, the other has the same score.
    read = [(p, got) for p, (got,) in zip(prompts, answers["local"]) if got.position is not None]
    for name in ("remote", "plain"):
        backend, feedback = getattr(stack, name).backend, [got.feedback_ids for _, got in read]
        again = score_given(backend, [p for p, _ in read], feedback, sampling, reader=reader)
        for (_, one), two in zip(read, again, strict=True):
            assert two.feedback_ids == one.feedback_ids and two.expected == pytest.approx(one.expected, abs=1e-3)
        # Greedy in fp32: the texts are the same too, but for a near tie.
        same = [a[0].token_ids == b[0].token_ids for a, b in zip(answers["local"], answers[name])]
        assert sum(same) >= 20


def test_samples_are_seeded(stack: SimpleNamespace) -> None:
    prompts, reader = make_prompts(stack.local, 6), stack.local.reader
    drawn = {}
    for seed in (0, 1):
        sampling = Sampling(n=3, temperature=1.0, top_p=1.0, max_new_tokens=NEW_TOKENS, seed=seed)
        for name in ("local", "remote"):
            judged = score_prompts(getattr(stack, name).backend, prompts, sampling, reader=reader)
            drawn[name, seed] = [got.token_ids for row in judged for got in row]
            alone = score_prompts(getattr(stack, name).backend, prompts[4:5], sampling, reader=reader)
            assert [got.token_ids for got in alone[0]] == drawn[name, seed][12:15]
    assert drawn["local", 0] != drawn["local", 1] and drawn["remote", 0] != drawn["remote", 1]
    assert len(set(drawn["local", 0])) > 5


def test_the_judge_itself(stack: SimpleNamespace) -> None:
    """Good words score above bad ones, from both backends alike."""
    texts = ["fine sound clear fine sound judge", "vague wrong rude vague judge"]
    local, remote = stack.local.score_prompts(texts), stack.remote.score_prompts(texts)
    assert local[0].score > local[1].score + 1
    for one, two in zip(local, remote):
        assert one.feedback == two.feedback and two.score == pytest.approx(one.score, abs=1e-3)
        assert list(one.distribution) == list("12345") and one.mass == pytest.approx(sum(one.distribution.values()))


def test_an_evaluation_through_both_backends(stack: SimpleNamespace, tmp_path: Path) -> None:
    """The command, as it is used: a benchmark in process, then its feedback read anew through the server."""
    path = write_rows(tmp_path / "rows.jsonl", make_rows(40, seed=5))
    flags = ["--model", stack.local.model, "--scale", "1-5", "--anchor", ANCHOR, "--benchmark", f"words={path}"]
    flags += ["--max_new_tokens", str(NEW_TOKENS), "--batch_size", "16", "--n_resamples", "20"]
    runs = {}
    for name, more in (("local", []), ("remote", ["--feedback_of", str(tmp_path / "local")])):
        args = evaluate.parse_args([*flags, "--output_dir", str(tmp_path / name), *more])
        evaluate.check(args)
        assert "| RAIL |" in command.run(args, backend=getattr(stack, name).backend)
        runs[name] = load_run(tmp_path / name)
    pairs = list(zip(runs["local"].predictions, runs["remote"].predictions, strict=True))
    assert len(pairs) == 40
    for one, two in pairs:
        assert (
            one.samples[0].token_ids[: one.samples[0].position] == two.samples[0].token_ids[: two.samples[0].position]
        )
        assert two.expected == pytest.approx(one.expected, abs=1e-3)
    found = runs["local"].results.benchmarks[0].scores["expected"]["pearson"].estimate
    want = stats.pearsonr([p.expected for p, _ in pairs], [p.label for p, _ in pairs]).statistic
    assert found == pytest.approx(want) and found > 0.5


GOOD, BAD = "fine sound clear fine sound", "vague wrong rude vague"


def rewards_of(words: list[str], folder: Path, tmp_path: Path) -> tuple[int | str | None, list[dict[str, Any]]]:
    """`serve --rewards` with these flags, asked in both forms."""
    template = tmp_path / "template.txt"
    template.write_text("{{ instruction }} {{ response }} judge\n")
    both = {"query": [f"<unk> fine {GOOD}</s>", f"fine {BAD}"], "prompts": ["fine", "fine"], "labels": ["", ""]}
    items = [{"instruction": "fine", "response": text} for text in (GOOD, BAD)]

    def ask(client: httpx.Client) -> list[Any]:
        return [client.post("/get_reward", json=both).json(), client.post("/score", json={"items": items}).json()]

    flags = ["--model", str(folder), "--scale", "1-5", "--anchor", ANCHOR, "--template", str(template)]
    return serve_until([*flags, "--max_new_tokens", str(NEW_TOKENS), *words], ask)


def check_rewards(got: list[dict[str, Any]], judge: Judge) -> None:
    wanted = judge.score_prompts([f"fine {text} judge" for text in (GOOD, BAD)])
    assert wanted[0].score > wanted[1].score + 1
    openrlhf, plain = got
    assert openrlhf["rewards"] == pytest.approx([score.score for score in wanted], abs=1e-3)
    assert openrlhf["scores"] == pytest.approx([(score.score - 1) / 4 for score in wanted], abs=1e-3)
    for one, score in zip(plain["results"], wanted):
        assert one["reward"] == pytest.approx(score.score, abs=1e-3) and one["feedback"] == score.feedback
        assert one["distribution"] == pytest.approx(score.distribution, abs=1e-3)


def test_the_judge_as_a_reward(stack: SimpleNamespace, judges: Path, tmp_path: Path) -> None:
    code, got = rewards_of(["--server", stack.url], judges / "tied", tmp_path)
    assert code == 143
    check_rewards(got, stack.local)


@pytest.mark.slow
def test_the_judge_as_a_reward_starts_its_own_server(stack: SimpleNamespace, judges: Path, tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    code, got = rewards_of(["--device", "cpu", "--max_model_len", "64"], judges / "tied", tmp_path)
    assert code == 143
    check_rewards(got, stack.local)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
