"""The backend on transformers against plain forward passes of the same model, and which judge gets it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_openrlhf.actors.engine.spec import EngineSpecError
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge import backends, cli
from real_openrlhf.judge.backends import SMALL_BYTES, chosen_backend
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.resolve_settings import plain_settings
from real_openrlhf.judge.scoring import score_prompts
from real_openrlhf.judge.transformers_backend import TransformersBackend, _draw_one, _parts
from real_openrlhf.judge.types import JudgeError
from tests.helpers.tiny_judge import ANCHOR, make_judge, make_rows, make_tokenizer

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A judge of words, trained for seconds: it writes "because", a word or two, and mostly a score."""
    folder = make_judge(tmp_path_factory.mktemp("judge"), steps=80)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(folder=folder, model=model, tokenizer=make_tokenizer())


def make(world: SimpleNamespace, scale: str = "1-5", **options: object) -> Judge:
    settings = plain_settings(world.folder, world.tokenizer, scale=scale, anchors=(ANCHOR,), max_new_tokens=NEW_TOKENS)
    return Judge(world.folder, settings=settings, backend="transformers", device="cpu", max_model_len=64, **options)  # type: ignore[arg-type]


def prompts_of(judge: Judge, n: int) -> list[Prompt]:
    made = []
    for row, values in enumerate(make_rows(n, seed=11)):
        text, ids = judge.settings.template.render(judge.tokenizer, values["prompt"])
        made.append(Prompt(token_ids=ids, label=math.nan, row=row, text=text))
    return made


def sampling(n: int = 1, temperature: float = 0.0, seed: int | None = 0, new_tokens: int = NEW_TOKENS) -> Sampling:
    return Sampling(n=n, temperature=temperature, top_p=1.0, max_new_tokens=new_tokens, seed=seed)


@torch.no_grad()
def logprobs_after(world: SimpleNamespace, ids: tuple[int, ...]) -> torch.Tensor:
    return world.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def test_greedy_responses_and_their_logprobs_are_those_of_plain_forward_passes(world: SimpleNamespace) -> None:
    """Prompts of different lengths in one batch, without any cache or padding in the reference."""
    judge = make(world)
    prompts = prompts_of(judge, 12)
    read = judge.reader.bound.read_token_ids
    ended = Counter()
    for prompt, group in zip(prompts, judge.backend.generate(prompts, sampling()), strict=True):
        (rollout,) = group.rollouts
        response = rollout.token_ids.tolist()
        for t, token in enumerate(response):
            row = logprobs_after(world, (*prompt.token_ids, *response[:t]))
            assert token == int(row.argmax())
            assert float(rollout.logprobs[t]) == pytest.approx(float(row[token]), abs=1e-5)
        ended[rollout.finish_reason] += 1
        assert (rollout.finish_reason == "stop") == (response[-1] == judge.tokenizer.eos_token_id)
        if rollout.reading.position is not None:
            row = logprobs_after(world, (*prompt.token_ids, *response[: rollout.reading.position]))
            torch.testing.assert_close(rollout.score_logprobs[0].double(), row[read], atol=1e-5, rtol=0)
    assert ended["stop"] > 5


@pytest.mark.parametrize("scale", ["1-5", "1=fine,2=fine sound,3=vague,4=vague wrong rude"])
def test_scores_are_exact_also_where_the_anchor_is_forced_and_labels_have_several_tokens(
    world: SimpleNamespace, scale: str
) -> None:
    judge = make(world, scale)
    labels = judge.reader.bound.anchors[0].labels
    prompts = prompts_of(judge, 8)
    n_read = 0
    for prompt, (got,) in zip(
        prompts, score_prompts(judge.backend, prompts, sampling(new_tokens=2), reader=judge.reader)
    ):
        if got.position is None:
            continue
        n_read += 1
        before = (*prompt.token_ids, *got.feedback_ids)
        want = []
        for label in labels:
            p = math.exp(sum(float(logprobs_after(world, (*before, *label[:i]))[t]) for i, t in enumerate(label)))
            longer = [o for o in labels if len(o) > len(label) and o[: len(label)] == label]
            for other in longer:
                rest = other[len(label) :]
                q = sum(float(logprobs_after(world, (*before, *label, *rest[:i]))[t]) for i, t in enumerate(rest))
                p *= 1 - math.exp(q)
            want.append(p)
        assert got.forced and [math.exp(v) for v in got.label_logprobs] == pytest.approx(want, abs=1e-5)
    assert n_read >= 6


def test_a_sample_depends_on_its_seed_and_prompt_alone(world: SimpleNamespace) -> None:
    judge = make(world)
    prompts = prompts_of(judge, 6)

    def drawn(prompts: list[Prompt], seed: int | None, n: int = 3) -> list[list[list[int]]]:
        groups = judge.backend.generate(prompts, sampling(n=n, temperature=1.0, seed=seed))
        return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]

    first = drawn(prompts, 0)
    assert drawn(prompts, 0) == first and drawn(prompts[::-1], 0) == first[::-1]
    assert drawn(prompts[4:5], 0) == first[4:5] and [row[:1] for row in first] == drawn(prompts, 0, n=1)
    assert drawn(prompts, 1) != first and drawn(prompts, None) != drawn(prompts, None)
    assert len({tuple(ids) for row in first for ids in row}) > 5


def test_draws_follow_the_distribution_and_the_nucleus() -> None:
    """Frequencies of 4,000 draws against the probabilities: within 4 standard errors."""
    probabilities, n = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64), 4000
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.7, [1, 3]), (0.5, [1]), (0.76, [1, 2, 3])):
        counts = Counter(_draw_one(probabilities, generator, top_p) for _ in range(n))
        assert sorted(counts) == kept
        total = float(probabilities[kept].sum())
        for token in kept:
            p = float(probabilities[token]) / total
            assert abs(counts[token] / n - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_distributions_at_another_temperature(world: SimpleNamespace) -> None:
    judge = make(world)
    backend = TransformersBackend(
        str(world.folder), judge.reader, max_model_len=64, device="cpu", logprobs_mode="processed_logprobs"
    )
    (prompt,) = prompts_of(judge, 1)
    ((rollout,),) = (group.rollouts for group in backend.generate([prompt], sampling(temperature=0.5)))
    with torch.no_grad():
        logits = world.model(torch.tensor([prompt.token_ids])).logits[0, -1].double()
    want = (logits / 0.5).log_softmax(-1)[rollout.token_ids[0]]
    assert float(rollout.logprobs[0]) == pytest.approx(float(want), abs=1e-5)
    with pytest.raises(EngineSpecError, match="temperature 1"):
        judge.backend.generate([prompt], sampling(temperature=0.5))


def test_what_is_too_long_or_closed_is_refused(world: SimpleNamespace) -> None:
    judge = make(world)
    long = Prompt(token_ids=(5,) * 60, label=math.nan, row=0, text="")
    with pytest.raises(JudgeError, match="a prompt of 60 tokens with 8 new ones exceeds the 64"):
        judge.backend.generate([long], sampling())
    backend = judge.backend
    judge.close()
    with pytest.raises(JudgeError, match="is closed"):
        backend.generate(prompts_of(judge, 1), sampling())


def test_batches_are_bounded_and_whole() -> None:
    prompts = [Prompt(token_ids=(1,) * n, label=math.nan, row=n, text="") for n in (3, 60000, 5, *range(10, 90))]
    parts = list(_parts(prompts, 2, 8))
    assert sorted(i for part in parts for i in part) == list(range(len(prompts)))
    assert parts[0] == [1] and all(len(part) * 2 <= 64 for part in parts)


@pytest.mark.parametrize(
    ("wanted", "size", "chosen"),
    [
        ("auto", 1000, "transformers"),
        ("auto", SMALL_BYTES + 1, "vllm"),
        ("auto", 0, "vllm"),
        ("transformers", SMALL_BYTES + 1, "transformers"),
        ("vllm", 1000, "vllm"),
    ],
)
def test_small_models_on_a_cpu_get_transformers(tmp_path: Path, wanted: str, size: int, chosen: str) -> None:
    for part in range(2):
        with (tmp_path / f"model-{part}.safetensors").open("wb") as file:
            file.truncate(size // 2 + part * (size % 2))
    assert chosen_backend(wanted, str(tmp_path), "cpu") == chosen
    assert chosen_backend(wanted, "owner/name", "cpu") == (wanted if wanted != "auto" else "vllm")


def test_on_a_gpu_auto_is_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from real_openrlhf.common.device import Device

    monkeypatch.setattr(Device, "resolve", lambda *_: Device(name="cuda", dtype_name="bf16"))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert chosen_backend("auto", str(tmp_path), "auto") == backends.VLLM


def test_flags_that_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(tmp_path), "--input", "x.jsonl", "--server", "http://127.0.0.1:1"]
    assert cli.main([*words, "--backend", "vllm"]) == 2
    assert "--backend vllm runs the model in this process, --server elsewhere" in capsys.readouterr().err
    with pytest.raises(JudgeError, match="there is no backend 'vlm'; there are auto, transformers, vllm"):
        Judge(tmp_path, backend="vlm")


def test_the_command_judges_rows_as_the_judge_does(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """From file to scores, nothing scripted."""
    prompts = ["fine sound clear fine sound judge", "vague wrong rude vague judge"]
    source, out = tmp_path / "rows.csv", tmp_path / "scores.jsonl"
    source.write_text("\n".join(["prompt", *prompts]))
    words = ["--model", str(world.folder), "--scale", "1-5", "--anchor", ANCHOR, "--max_new_tokens", str(NEW_TOKENS)]
    words += ["--input", str(source), "--prompt_key", "prompt", "--output", str(out), "--device", "cpu"]
    assert cli.main(words) == 0
    written = [json.loads(line)["judgement"] for line in out.read_text().splitlines()]
    found = make(world).score_prompts(prompts)
    assert [row["score"] for row in written] == pytest.approx([score.score for score in found], abs=1e-6)
    assert [row["feedback"] for row in written] == [score.feedback for score in found]
    assert written[0]["score"] != written[1]["score"]
