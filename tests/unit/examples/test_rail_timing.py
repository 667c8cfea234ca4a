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


def test_all_ways_and_batch_sizes_are_timed_in_turns_on_the_same_prompts(judge: Judge) -> None:
    calls = judge.backend.calls  # type: ignore[attr-defined]

    def kind(call: tuple) -> str:
        prompts, sampling, _ = call
        return "generate" if not prompts[0].given_ids else "cached" if sampling.continues else "rescore"

    # A call costs the same whatever it holds: batches of 1 take twice as long as those of 2.
    cost = {"generate": 1.0, "rescore": 0.5, "cached": 0.25}
    timing = rail_timing.time_all(judge, prompts(9), [1, 2], clock=lambda: sum(cost[kind(call)] for call in calls))
    one, again, cached = rail_timing.ONE_PASS, rail_timing.RESCORED, rail_timing.CACHED
    assert timing.seconds == {
        (1, one): [2.0] * 3, (1, again): [3.0] * 3, (1, cached): [2.5] * 3,
        (2, one): [1.0] * 3, (2, again): [1.5] * 3, (2, cached): [1.25] * 3,
    }  # fmt: skip
    assert timing.factors((2, again), (2, one)) == [1.5] * 3 and timing.factors((1, one), (2, one)) == [2.0] * 3
    # The ninth prompt is no whole round; the first two only warm up.
    assert timing.n == 6 and timing.n_forced == 0 and timing.largest_difference < 1e-9
    kinds = [kind(call) for call in calls]
    assert kinds[:2] == ["generate", "rescore"]
    assert kinds[2:8] == ["generate", "generate", *["generate", "rescore"] * 2]
    # In the next round the second way comes first.
    per_round = (len(kinds) - 2) // 3
    assert kinds[2 + per_round : 6 + per_round] == ["generate", "rescore"] * 2
    assert {p.row for call in calls[2 : 2 + per_round] for p in call[0]} == {2, 3}
    by_key = {(each["batch_size"], each["way"]): each for each in timing.to_json()["ways"]}
    per_judgement = len(judge.tokenizer("text . So the overall score is 2 <eos>")["input_ids"])
    for (size, way), each in by_key.items():
        total = sum(timing.seconds[size, way])
        assert each["judgements_per_second"] == pytest.approx(6 / total)
        assert each["generated_tokens_per_second"] == pytest.approx(6 * per_judgement / total)
    assert by_key[2, again]["times_one_pass"] == [1.5] * 3
    text = rail_timing.shown(timing, [1, 2])
    assert "| 2 | generate, then rescore | 1.33 | " in text and "1.50 [1.50, 1.50] |" in text
    assert "One pass, batches of 1 against 2: 2.00 times the seconds [2.00, 2.00]" in text


def test_a_single_round_is_not_enough(judge: Judge) -> None:
    with pytest.raises(ValueError, match="3 prompts are fewer than two rounds of 2; the first only warms up"):
        rail_timing.time_all(judge, prompts(3), [2])
    with pytest.raises(ValueError, match="3 does not divide 8"):
        rail_timing.time_all(judge, prompts(16), [3, 8])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model and --benchmark are required"),
        (["--model", "m", "--benchmark", "b=x", "--batch_sizes", "8", "8"], "different numbers of at least 1"),
        (["--model", "m", "--benchmark", "b=x", "--batch_sizes", "0"], "different numbers of at least 1"),
    ],
)
def test_flags_are_checked(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rail_timing.main(flags) == 2
    assert message in capsys.readouterr().err
