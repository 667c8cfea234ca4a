from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import real_openrlhf.dropin.reward as module
from real_openrlhf.algo.objectives import make_objective
from real_openrlhf.dropin.reward import make_reward_func, response_of, reward_func
from real_openrlhf.dropin.settings import DropInError, RealSettings
from tests.helpers.scripted_engine import ScriptedEngine, character_tokenizer, sampling

ANCHOR = "So the overall score is "
PROMPT = f"rate this.\n{ANCHOR}9."


def one(response: str, label: Any, function: Any = reward_func) -> tuple[float, float, float]:
    got = function([f"<s> {PROMPT}{response}"], [PROMPT], [label])
    return (float(got["rewards"]), float(got["scores"]), float(got["extra_logs"]["real_on_scale"]))


@pytest.mark.parametrize(
    ("response", "label", "wanted"),
    [
        (f"good. {ANCHOR}4<eos>", 4, (0.0, 1.0, 1.0)),
        (f"good. {ANCHOR}4", "2.5", (-2.25, 0.0, 1.0)),
        (f"{ANCHOR}2, no: {ANCHOR}3.<eos>", 2.5, (-0.25, 1.0, 1.0)),
        (f"{ANCHOR}45<eos>", 4, (-16.0, 0.0, 0.0)),  # 0 is the farthest from 4
        (f"{ANCHOR}4.5", 4, (-16.0, 0.0, 0.0)),
        (f"{ANCHOR}4分", 4, (0.0, 1.0, 1.0)),
        ("the score is 4", 4, (-16.0, 0.0, 0.0)),
        ("", 1, (-16.0, 0.0, 0.0)),
    ],
)
def test_by_hand(response: str, label: Any, wanted: tuple[float, float, float]) -> None:
    assert one(response, label) == wanted


def test_longest_label_and_penalty() -> None:
    function = make_reward_func(RealSettings(scale="1-10", invalid_penalty=0.5))
    assert one(f"{ANCHOR}10<eos>", 10, function) == (0.0, 1.0, 1.0)
    assert one(f"{ANCHOR}1<eos>", 10, function) == (-81.0, 0.0, 1.0)
    assert one("no", 10, function) == (-100.5, 0.0, 0.0)
    assert one(f"{ANCHOR}11<eos>", 10, function) == (-100.0, 0.0, 0.0)  # readable, off the scale


def test_standard_rl() -> None:
    function = make_reward_func(objective="standard_rl")
    assert [one(ANCHOR + s, 3.5, function)[0] for s in "2345"] == [0.0, 1.0, 1.0, 0.0]
    with pytest.raises(DropInError, match="need probabilities"):
        make_reward_func(objective="real")


def test_a_batch_has_the_rewards_of_the_objective() -> None:
    texts = [f"a. {ANCHOR}{s}" for s in "15837"] + ["no"]
    got = reward_func([PROMPT + t for t in texts], [PROMPT] * 6, [2] * 6)
    settings = RealSettings()
    objective = make_objective("mse_rl", {"standardise": True, "clip": 1.0, "tolerance": 1e-6, "invalid_penalty": 0.0})
    group = settings.group_scores(torch.zeros(6, 5), torch.tensor([True] * 5 + [False]), settings.target(2))
    sampled = torch.tensor([0, 4, -1, 2, -1, -1])
    wanted = objective(type(group)(**(vars(group) | {"sampled": sampled}))).rewards
    assert got["rewards"].tolist() == wanted.tolist()
    assert got["rewards"].dtype == got["scores"].dtype == torch.float32


def test_the_response_begins_where_the_prompt_ends() -> None:
    assert response_of("<s> rate  this 4: x y", "rate this 4 :") == " x y"
    assert response_of("ab ab c", "ab") == " ab c"
    for query, prompt in (("this 4: x", "rate this 4:"), ("x", " ")):
        with pytest.raises(DropInError, match=r"--data.max_len.*--train.agent_func_path"):
            response_of(query, prompt)


def test_errors_are_logged_as_errors_since_openrlhf_does_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="from 1 to 5"):
        one(ANCHOR + "4", "good")
    assert "--data.label_key" in caplog.text
    with pytest.raises(DropInError, match="2 queries, 1 prompts"):
        reward_func(["a", "b"], ["a"], [1])


def test_inside_openrlhfs_executor() -> None:
    """Loaded by its path and called by OpenRLHF's own class, with what its engine returned."""
    agent = pytest.importorskip("openrlhf.utils.agent")
    tokenizer = character_tokenizer()
    response = tokenizer("good. " + ANCHOR + "2", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt = "rate: " + ANCHOR + "9."
    executor = agent.SingleTurnAgentExecutor(remote_rm_url=[str(Path(str(module.__file__)))])
    engine = ScriptedEngine(tokenizer, [response])
    output = asyncio.run(executor.execute(prompt, "4", sampling(), 200, tokenizer, engine))
    assert float(output["reward"]) == -4.0 and float(output["scores"]) == 0.0
    assert {k: float(v) for k, v in output["extra_logs"].items()} == {"real_on_scale": 1.0}
    assert output["action_ranges"] == [(len(prompt), len(prompt) + len(response))]
