"""The reward server over real HTTP on a scripted judge, OpenRLHF's own client among those who ask."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from real_openrlhf.data.judge_prompt import JudgeTemplate
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge.http_backend import ServerError
from real_openrlhf.judge.judge import Judge
from real_openrlhf.judge.resolve_settings import make_reader
from real_openrlhf.judge.rewards.answers import Rewarding
from real_openrlhf.judge.rewards.app import RewardApp, has_token
from real_openrlhf.judge.rewards.requests import Reading
from real_openrlhf.judge.rewards.scorer import Scorer
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer

TOKENIZER = word_tokenizer(["<e", "os>"], chat_template=CHAT_TEMPLATE)
TEMPLATE = JudgeTemplate(
    name="short", text="rate : {{ instruction }} answer : {{ response }}{% if reference %} {{ reference }}{% endif %}"
)
PROBABILITIES = (0.1, 0.2, 0.6)
EXPECTED = 0.1 + 0.4 + 1.8


class Backend(FakeBackend):
    """The scripted judge; "bad" is a response without a score, even after the forced anchor, "feedback" breaks the
    server below. `gate` holds every answer back until it is set."""

    gate: threading.Event

    def generate(self, prompts: Any, sampling: Any) -> Any:
        assert self.gate.wait(20)
        if any("feedback" in prompt.text for prompt in prompts):
            raise ServerError("the server below is gone")
        return super().generate(prompts, sampling)


def say(prompt: Prompt, sample: int) -> tuple[str, tuple[float | None, ...]]:
    if "bad" in prompt.text:
        return "text <eos>", PROBABILITIES
    return "text . So the overall score is 3 <eos>", PROBABILITIES


@contextmanager
def serving(folder: Path, **more: Any) -> Iterator[SimpleNamespace]:
    with ExitStack() as stack:
        judge = Judge(folder, backend=object(), template=TEMPLATE, force=False)  # type: ignore[arg-type]
        backend = Backend(reader=make_reader(judge.settings, TOKENIZER), tokenizer=TOKENIZER, script=say)
        backend.gate, backend.max_model_len = threading.Event(), 60
        backend.gate.set()
        judge._backend = backend
        scorer = stack.enter_context(Scorer(judge, threads=more.pop("threads", 4), max_queue=more.pop("max_queue", 8)))
        made = RewardApp(
            scorer,
            reading=Reading(ends=("<eos>",), max_items=4),
            rewarding=Rewarding(scale=judge.scale, unscored=more.pop("unscored", None)),
            max_bytes=more.pop("max_bytes", 2000),
            **more,
        )
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = uvicorn.Server(uvicorn.Config(made.app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=30))
            yield SimpleNamespace(client=client, backend=backend, scorer=scorer, url=str(client.base_url))
        finally:
            backend.gate.set()
            server.should_exit = True
            thread.join()


@pytest.fixture
def served(folder: Path) -> Iterator[SimpleNamespace]:
    with serving(folder) as found:
        yield found


ONE = {"query": ["<s> a good <eos>"], "prompts": ["a"], "labels": ["rate"]}


def rows(*responses: str) -> dict[str, list[str]]:
    return {"query": [f"a {r}" for r in responses], "prompts": ["a"] * len(responses), "labels": [""] * len(responses)}


def test_openrlhfs_form(served: SimpleNamespace) -> None:
    answer = served.client.post("/get_reward", json=ONE)
    assert answer.status_code == 200 and answer.json() == {
        "rewards": [pytest.approx(EXPECTED)],
        "scores": [pytest.approx((EXPECTED - 1) / 2)],
        "extra_logs": {"judge_scored": [1.0], "judge_mass": [pytest.approx(0.9)], "judge_forced": [0.0]},
    }
    (prompt,) = served.backend.calls[0][0]
    assert "rate : a answer :  good  rate" in prompt.text and prompt.text.count("<eos>") == 1  # the chat template's


def test_the_plain_form(served: SimpleNamespace) -> None:
    one = served.client.post("/score", json={"instruction": "a", "response": "good", "reference": "b"}).json()
    assert one["reward"] == one["score"] == pytest.approx(EXPECTED)
    assert one["distribution"] == {str(v): pytest.approx(p) for v, p in zip((1, 2, 3), PROBABILITIES)}
    assert one["feedback"] == "text ." and one["decoded"] == 3.0 and one["reason"] is None
    items = [{"instruction": "a", "response": "good"}, {"instruction": "a", "response": "bad"}, {"response": "good"}]
    items.append({"instruction": "a", "response": "good", "context": "x"})
    first, second, third, fourth = served.client.post("/score", json={"items": items}).json()["results"]
    assert first["score"] == pytest.approx(EXPECTED)
    assert second["score"] is None and second["reward"] is None and second["reason"] == "no_anchor"
    assert third == {"error": "item 2: the instruction must be a text, got NoneType"}
    assert "template short has no place for the context" in fourth["error"]


def test_what_has_no_score_fails_unless_it_is_given_a_reward(folder: Path, served: SimpleNamespace) -> None:
    long = rows("good", "good " * 60)
    for body, match in (
        (rows("good", "bad"), "item 1: the judge's response has no readable score"),
        (long, "item 1: "),
    ):
        answer = served.client.post("/get_reward", json=body)
        assert answer.status_code == 422
        assert match in answer.json()["error"] and "--unscored_reward" in answer.json()["error"]
    with serving(folder, unscored=-1.5) as other:
        got = other.client.post("/get_reward", json=rows("bad", "good", "good " * 60)).json()
    assert got["rewards"] == [-1.5, pytest.approx(EXPECTED), -1.5]
    assert got["extra_logs"]["judge_scored"] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("route", "content", "status", "match"),
    [
        ("/get_reward", b"{", 400, "not JSON"),
        ("/get_reward", b"\xff", 400, "not JSON"),
        ("/score", b"[" * 1900, 400, "not JSON"),
        ("/get_reward", b'{"a": "' + b"a" * 3000 + b'"}', 413, "--max_request_mb"),
        ("/get_reward", b"[]", 422, "query, prompts and labels"),
        ("/score", b"{}", 422, "the instruction must be a text"),
        ("/score", b'{"items": [1, 2, 3, 4, 5]}', 413, "--max_items"),
        ("/score", b'{"instruction": "a", "response": "feedback"}', 502, "the server below is gone"),
        ("/score", b'{"instruction": "a", "response": "b", "weights": {"tone": 1}}', 422, "several dimensions"),
    ],
)
def test_a_bad_request_gets_its_own_error(
    served: SimpleNamespace, route: str, content: bytes, status: int, match: str
) -> None:
    answer = served.client.post(route, content=content)
    assert answer.status_code == status and match in answer.json()["error"]
    assert served.client.post("/get_reward", json=ONE).status_code == 200


def test_a_body_of_unknown_length_is_cut_off_too(served: SimpleNamespace) -> None:
    answer = served.client.post("/score", content=(b"a" * 500 for _ in range(6)))
    assert answer.status_code == 413


def test_an_error_that_nobody_foresaw_stays_in_the_log(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(served.backend, "generate", broken)
    answer = served.client.post("/get_reward", json=ONE)
    assert answer.status_code == 500 and answer.json() == {"error": "KeyError; see the server's log"}
    assert "secret" in caplog.text


def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_the_queue_is_bounded(folder: Path) -> None:
    with serving(folder, threads=1, max_queue=3) as served:
        served.backend.gate.clear()
        answers: list[int] = []
        body = rows("good", "good")
        asking = threading.Thread(
            target=lambda: answers.append(served.client.post("/get_reward", json=body).status_code)
        )
        asking.start()
        until(lambda: served.scorer.waiting == 2)
        refused = httpx.post(f"{served.url}/get_reward", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "2 items wait already and 2 more do not fit (--max_queue)" in refused.json()["error"]
        served.backend.gate.set()
        asking.join()
        assert answers == [200] and served.client.post("/get_reward", json=body).status_code == 200
        until(lambda: served.scorer.waiting == 0)


def test_what_waits_is_dropped_when_its_client_has_gone(folder: Path) -> None:
    with serving(folder, threads=1) as served:
        served.backend.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/get_reward", json=rows("good", "good", "good"), timeout=0.2)
        until(lambda: served.scorer.waiting == 1)  # the one that has begun
        served.backend.gate.set()
        until(lambda: served.scorer.waiting == 0)
        assert len(served.backend.calls) == 1
        assert 'real_judge_items_total{outcome="dropped"} 3.0' in served.client.get("/metrics").text


def test_health_and_metrics(folder: Path) -> None:
    lives = threading.Event()
    lives.set()
    with serving(folder, ready=lives.is_set) as served:
        assert served.client.get("/health").json() == {
            "status": "ok",
            "model": str(folder),
            "scale": "1,2,3",
            "waiting": 0,
        }
        served.client.post("/get_reward", json=rows("good", "bad"))
        served.client.post("/get_reward", content=b"{")
        text = served.client.get("/metrics").text
        assert 'real_judge_requests_total{route="/get_reward",status="400"} 1.0' in text
        assert 'real_judge_requests_total{route="/get_reward",status="422"} 1.0' in text
        assert 'real_judge_items_total{outcome="scored"} 1.0' in text
        assert 'real_judge_items_total{outcome="unscored"} 1.0' in text
        assert 'real_judge_request_seconds_count{route="/get_reward"} 2.0' in text and "real_judge_waiting 0.0" in text
        lives.clear()
        assert served.client.get("/health").status_code == 503


def test_the_token(folder: Path) -> None:
    with serving(folder, token="tök:en") as served:
        post = served.client.post
        assert post("/get_reward", json=ONE).status_code == 401
        assert post("/get_reward", json=ONE, headers={"Authorization": "Bearer tok"}).status_code == 401
        right = {"Authorization": "Bearer tök:en".encode()}
        assert post("/get_reward", json=ONE, headers=right).status_code == 200
        assert post("/score", content=b"{", auth=("anyone", "tök:en")).status_code == 400
        assert served.client.get("/health").status_code == 200
    for header in ("", "Basic", "Basic !", "Basic eA==", "Token tök:en"):
        assert not has_token(header, "tök:en")


def test_openrlhfs_own_client_gets_the_rewards(folder: Path) -> None:
    """Its executor, as a stock run makes it with --reward.remote_url, with the token in the address."""
    pytest.importorskip("openrlhf")
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    class Engine:
        async def generate(self, prompt_ids: Any, params: Any, multi_modal_data: Any = None) -> Any:
            ids = TOKENIZER.encode("good <eos>", add_special_tokens=False)
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

    with serving(folder, token="open") as served:
        url = served.url.replace("http://", "http://openrlhf:open@")
        executor = SingleTurnAgentExecutor([f"{url}/get_reward"])
        params = SimpleNamespace(max_tokens=8, logprobs=None)
        output = asyncio.run(executor.execute("rate a", "", params, 40, TOKENIZER, Engine()))
        assert output["reward"] == [pytest.approx(EXPECTED)] and output["scores"] == [pytest.approx((EXPECTED - 1) / 2)]
        assert output["extra_logs"]["judge_scored"] == [1.0]
        (prompt,) = served.backend.calls[0][0]
        assert "rate : rate a answer :" in prompt.text and prompt.text.count("<eos>") == 1
