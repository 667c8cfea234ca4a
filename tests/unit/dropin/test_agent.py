"""The agent inside OpenRLHF's own executor, on a scripted engine, against the formulas in plain numbers."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from real_openrlhf.dropin.settings import DropInError, RealSettings
from tests.helpers.scripted_engine import ScriptedEngine, character_tokenizer, next_logprobs, sampling

pytest.importorskip("openrlhf.utils.agent")
from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

from real_openrlhf.dropin.agent import AgentExecutor

ANCHOR = "So the overall score is "
PROMPT = "rate this. So the overall score is 9."
TOKENIZER = character_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def agent(**settings: Any) -> AgentExecutor:
    """As a user changes the settings: by a subclass."""
    return type("Agent", (AgentExecutor,), {"settings": RealSettings(**settings)})()


def run(
    response: str,
    label: Any = 4,
    executor: AgentExecutor | None = None,
    *,
    end: bool = True,
    engine: dict[str, Any] | None = None,
    max_length: int = 200,
    **params: Any,
) -> tuple[dict[str, Any], ScriptedEngine]:
    tokens = [*ids(response), *([TOKENIZER.eos_token_id] if end else [])]
    scripted = ScriptedEngine(TOKENIZER, [tokens], finish="stop" if end else "length", **(engine or {}))
    output = asyncio.run(
        (executor or agent()).execute(PROMPT, label, sampling(**params), max_length, TOKENIZER, scripted)
    )
    return output, scripted


def probabilities(before: str) -> dict[str, float]:
    """The engine's distribution over characters after a prompt and a response so far."""
    logprobs = next_logprobs(ids(PROMPT + before), len(TOKENIZER))
    return {c: math.exp(float(logprobs[ids(c)[0]])) for c in "0123456789"}


def test_reward_score_and_logs_by_hand() -> None:
    before = "good. " + ANCHOR
    output, engine = run(before + "4 ok", label="3.5", executor=agent(lam=0.5))
    p = probabilities(before)
    expected = sum(v * p[str(v)] for v in range(1, 6))
    reward = -((expected - 3.5) ** 2) + 0.5 * (math.log(p["3"]) + math.log(p["4"])) / 2
    assert output["reward"] == pytest.approx(reward, rel=1e-6)
    assert output["scores"] == 1.0
    assert output["extra_logs"] == pytest.approx(
        {
            "real_readable": 1.0,
            "real_accuracy": 1.0,
            "real_expected": expected,
            "real_abs_error": abs(expected - 3.5),
            "real_mass": sum(p[str(v)] for v in range(1, 6)),
        },
        rel=1e-6,
    )
    assert len(engine.requests) == 1  # nothing but the generation itself


def test_renormalised() -> None:
    output, _ = run(ANCHOR + "4", label=2, executor=agent(renormalise=True))
    p = probabilities(ANCHOR)
    mass = sum(p[str(v)] for v in range(1, 6))
    expected = sum(v * p[str(v)] for v in range(1, 6)) / mass
    assert output["extra_logs"]["real_expected"] == pytest.approx(expected, rel=1e-6)
    assert output["extra_logs"]["real_mass"] == pytest.approx(mass, rel=1e-6)
    assert output["reward"] == pytest.approx(-((expected - 2) ** 2) + math.log(p["2"] / mass), rel=1e-6)


def test_the_actions_are_the_feedback_and_the_rest_is_openrlhfs() -> None:
    before = "good. " + ANCHOR
    output, engine = run(before + "4 ok", logprobs=1, engine={"logprobs_mode": "processed_logprobs"})
    tokens = output["observation_tokens"]
    assert tokens == [*ids(PROMPT + before + "4 ok"), TOKENIZER.eos_token_id]
    ((start, end),) = output["action_ranges"]
    assert (start, end) == (len(ids(PROMPT)), len(ids(PROMPT + before)))
    # Everything but actions, reward, score and logs is what OpenRLHF's own executor says of the same generation.
    stock = ScriptedEngine(TOKENIZER, [tokens[start:]])
    theirs = asyncio.run(SingleTurnAgentExecutor().execute(PROMPT, 4, sampling(logprobs=1), 200, TOKENIZER, stock))
    changed = {"action_ranges", "reward", "scores", "extra_logs"}
    assert {k: v for k, v in output.items() if k not in changed} == {
        k: v for k, v in theirs.items() if k not in changed
    }
    assert len(output["rollout_log_probs"]) == len(tokens) and output["rollout_log_probs"][start] < 0
    # vLLM refuses a number of log-probs beside chosen tokens.
    asked = engine.requests[0][1]
    assert asked.logprobs is None and asked.logprob_token_ids == sorted(ids("12345"))


def test_without_importance_weights_there_are_no_rollout_log_probs() -> None:
    assert run(ANCHOR + "4")[0]["rollout_log_probs"] is None


@pytest.mark.parametrize(("written", "accuracy"), [("3", 1.0), ("4", 1.0), ("5", 0.0), ("7", 0.0)])
def test_accuracy_is_about_the_written_score_and_the_reward_is_not(written: str, accuracy: float) -> None:
    output, _ = run(ANCHOR + written, label=3.5)
    assert output["scores"] == accuracy and output["extra_logs"]["real_readable"] == 1.0
    assert output["reward"] == run(ANCHOR + "1", label=3.5)[0]["reward"]


def test_a_rollout_without_a_score_gets_the_floor_and_all_of_it_is_trained() -> None:
    output, _ = run("no idea", label=2, executor=agent(invalid_penalty=0.5, lam=2.0))
    assert output["reward"] == pytest.approx(-9.0 - 0.5 + 2 * math.log(1e-6))  # 5 is the farthest from 2
    assert output["action_ranges"] == [(len(ids(PROMPT)), len(output["observation_tokens"]))]
    assert output["extra_logs"] == dict.fromkeys(run(ANCHOR + "4")[0]["extra_logs"], 0.0)


def test_a_response_that_was_cut_off_inside_the_anchor() -> None:
    output, _ = run("good. So the overall", end=False)
    assert output["truncated"] and output["extra_logs"]["real_readable"] == 0.0


def test_labels_of_several_tokens_take_requests_of_one_token() -> None:
    before = "a " + ANCHOR
    p = probabilities(before)
    after_1 = probabilities(before + "1")
    expected = sum(v * p[str(v)] for v in range(2, 10)) + p["1"] * (1 - after_1["0"]) + 10 * p["1"] * after_1["0"]
    for written, requests in (("3", 2), ("1.", 1), ("10", 1)):
        output, engine = run(before + written, executor=agent(scale="1-10"), max_length=150)
        assert output["extra_logs"]["real_expected"] == pytest.approx(expected, rel=1e-5)
        assert len(engine.requests) == requests
    forced, asked = run(before + "3", executor=agent(scale="1-10"))[1].requests[1]
    assert forced == ids(PROMPT + before + "1") and asked.max_tokens == 1
    # The forced label must fit behind the longest response.
    params = {"max_tokens": None}
    assert run(before + "3", executor=agent(scale="1-10"), max_length=100, **params)[1].requests[0][
        1
    ].max_tokens == 100 - 1 - len(ids(PROMPT))


def test_sampling_that_the_log_probs_do_not_speak_of_is_refused() -> None:
    with pytest.raises(DropInError, match=r"--rollout.temperature.*temperature 0.7.*is_correction_level token"):
        run(ANCHOR + "4", temperature=0.7)
    processed = {"logprobs_mode": "processed_logprobs"}
    assert run(ANCHOR + "4", temperature=0.7, engine=processed)[0]["scores"] == 1.0
    with pytest.raises(DropInError, match=r"top_p 0.9"):
        run(ANCHOR + "4", top_p=0.9, engine=processed)
    with pytest.raises(DropInError, match="top_k 5"):
        run(ANCHOR + "4", top_k=5, engine=processed)
    assert run(ANCHOR + "4", top_p=0.9)[0]["scores"] == 1.0
    assert run(ANCHOR + "4", temperature=0.0)[0]["scores"] == 1.0


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(DropInError, match=r"--data.label_key: 'good' is not a number.*begins 'rate this"):
        run(ANCHOR + "4", label="good")
    with pytest.raises(DropInError, match="max_images_per_prompt"):
        asyncio.run(agent().execute(PROMPT, 4, sampling(), 200, TOKENIZER, None, images=["a.png"]))
    old = sampling()
    del old.logprob_token_ids
    with pytest.raises(DropInError, match=r"vLLM 0\.29"):
        asyncio.run(agent().execute(PROMPT, 4, old, 200, TOKENIZER, ScriptedEngine(TOKENIZER, [])))


class BrokenEngine(ScriptedEngine):
    """Does something to every answer."""

    def __init__(self, change: Any) -> None:
        super().__init__(TOKENIZER, [ids(ANCHOR + "4")])
        self.change = change

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        answer = await super().generate(*args, **kwargs)
        self.change(answer.outputs[0])
        return answer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o: setattr(o, "logprobs", None), "no log-probs"),
        (lambda o: o.logprobs[-1].pop(ids("2")[0]), "did not return the log-prob of token"),
        (lambda o: setattr(o, "finish_reason", "abort"), "'abort'"),
        (lambda o: o.logprobs[-1].update({ids("4")[0]: SimpleNamespace(logprob=-math.inf)}), "finite"),
    ],
)
def test_answers_that_cannot_be_read_are_refused(change: Any, says: str) -> None:
    with pytest.raises((DropInError, RuntimeError), match=says):
        asyncio.run(agent().execute(PROMPT, 4, sampling(), 200, TOKENIZER, BrokenEngine(change)))


def test_a_label_of_probability_zero_is_refused() -> None:
    def change(output: Any) -> None:
        output.logprobs[-1][ids("2")[0]] = SimpleNamespace(logprob=-math.inf)

    with pytest.raises(DropInError, match="the reward is -inf for the label 2"):
        asyncio.run(agent().execute(PROMPT, 2, sampling(), 200, TOKENIZER, BrokenEngine(change)))


def test_the_file_loads_as_openrlhf_loads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its path, in a module that is not registered; the settings change by a file of the user's."""
    import real_openrlhf.dropin.agent as module

    own = tmp_path / "judge_agent.py"
    own.write_text(
        "from real_openrlhf.dropin.agent import AgentExecutor as Real\n"
        "from real_openrlhf.dropin.settings import RealSettings\n\n"
        "class AgentExecutor(Real):\n"
        "    settings = RealSettings(scale='0-9')\n"
    )
    for path, scale in ((Path(str(module.__file__)), "1-5"), (own, "0-9")):
        spec = importlib.util.spec_from_file_location("agent_module", path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        assert issubclass(loaded.AgentExecutor, AgentExecutorBase)
        assert loaded.AgentExecutor().settings == RealSettings(scale=scale)
    with caplog.at_level(logging.WARNING):
        assert run(ANCHOR + "0", label=0, executor=loaded.AgentExecutor())[0]["scores"] == 1.0
