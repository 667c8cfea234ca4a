"""The timing script on a fake engine whose clock ticks per request."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.export.settings import JudgeSettings
from real_openrlhf.judge.judge import Judge
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.tokenizers import word_tokenizer

_SPEC = importlib.util.spec_from_file_location(
    "rail_timing", Path(__file__).parents[3] / "examples/benchmark/rail_timing.py"
)
assert _SPEC and _SPEC.loader
rail_timing = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = rail_timing  # dataclasses look their module up
_SPEC.loader.exec_module(rail_timing)

TOKENIZER = word_tokenizer()


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    TOKENIZER.save_pretrained(tmp_path)
    settings = JudgeSettings(
        scale=ScoreScale.parse("1-3"),
        anchors=("So the overall score is ",),
        end_ids=(TOKENIZER.eos_token_id,),
        max_new_tokens=20,
    )

    def script(prompt: Prompt, sample: int) -> tuple[str, tuple[float, ...]]:
        said = "2 <eos>" if prompt.given_ids else "text . So the overall score is 2 <eos>"
        return said, (0.1, 0.2, 0.6)

    made = Judge(tmp_path, settings=settings, backend=object())  # type: ignore[arg-type]
    made._backend = FakeBackend(made.reader, made.tokenizer, script)
    return made


def prompts(n: int) -> list[Prompt]:
    return [Prompt(token_ids=(5, 6, 7), label=2.0, row=i, text="") for i in range(n)]


def test_all_ways_are_timed_in_turns_on_the_same_prompts(judge: Judge) -> None:
    calls = judge.backend.calls  # type: ignore[attr-defined]

    def kind(call: tuple) -> str:
        prompts, sampling, _ = call
        return "generate" if not prompts[0].given_ids else "cached" if sampling.continues else "rescore"

    cost = {"generate": 1.0, "rescore": 0.5, "cached": 0.25}
    timing = rail_timing.time_all(judge, prompts(8), 2, clock=lambda: sum(cost[kind(call)] for call in calls))
    assert list(timing.seconds.values()) == [[1.0] * 3, [1.5] * 3, [1.25] * 3]
    assert timing.factor(rail_timing.RESCORED) == 1.5 and timing.factors(rail_timing.CACHED) == [1.25] * 3
    assert timing.n == 6 and timing.n_forced == 0 and timing.largest_difference < 1e-9
    # Warm-up; then each way begins once.
    again, cached = ["generate", "rescore"], ["generate", "cached"]
    assert [kind(call) for call in calls] == [
        *again, "generate", *again, *cached, *again, *cached, "generate", *cached, "generate", *again,
    ]  # fmt: skip
    assert [p.row for p in calls[2][0]] == [p.row for p in calls[3][0]] == [p.row for p in calls[5][0]] == [2, 3]


def test_a_single_batch_is_not_enough(judge: Judge) -> None:
    with pytest.raises(ValueError, match="only warms up"):
        rail_timing.time_all(judge, prompts(2), 2)


def test_flags_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert rail_timing.main([]) == 2
    assert "--model and --benchmark are required" in capsys.readouterr().err
