"""Requests and answers of the server's backend, over real HTTP, against a server with a script."""

from __future__ import annotations

import math

import pytest

from real_openrlhf.actors.engine.spec import EngineSpecError, request_seed
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge import http_backend as module
from real_openrlhf.judge.http_backend import ServerBackend, ServerError
from real_openrlhf.judge.scoring import score_prompts
from real_openrlhf.judge.types import JudgeError
from tests.helpers.completion_server import Behaviour, completion_server
from tests.helpers.tokenizers import word_tokenizer

TOKENIZER = word_tokenizer()
READER = ScoreReader.build(bind_scale(ScoreScale.parse("1-3"), TOKENIZER), TOKENIZER, [TOKENIZER.eos_token_id])
ANCHOR = "So the overall score is"
SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_new_tokens=20, seed=5)
ONE, TWO, THREE = (TOKENIZER.convert_tokens_to_ids(digit) for digit in "123")
ROW = {ONE: 0.1, TWO: 0.2, THREE: 0.6}


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def prompts(n: int) -> list[Prompt]:
    return [Prompt(token_ids=(*ids("rate this"), i), label=math.nan, row=40 + i, text="") for i in range(n)]


@pytest.fixture
def served():
    """(behaviour, make): a server that says "good <anchor> 3", and backends for it."""
    behaviour = Behaviour(model=lambda prompt: (ids(f"good {ANCHOR} 3 <eos>"), ROW))
    made = []
    with completion_server(behaviour) as url:

        def make(**options) -> ServerBackend:
            made.append(ServerBackend(options.pop("url", url), reader=READER, **options))
            return made[-1]

        yield behaviour, make
        for backend in made:
            backend.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> list[float]:
    """The waits between attempts, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    return waits


def test_groups_come_back_in_order_with_the_labels_log_probs(served) -> None:
    behaviour, make = served
    behaviour.model = lambda prompt: (ids(f"good {ANCHOR} {prompt[-1] % 3 + 1} <eos>"), ROW)
    groups = make(concurrency=4).generate(prompts(7), SAMPLING)
    assert [g.row for g in groups] == list(range(40, 47)) and all(len(g) == 2 for g in groups)
    assert [r.reading.label_index for g in groups for r in g.rollouts] == [i % 3 for i in range(7) for _ in "ab"]
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.score_logprobs[0].exp().tolist() == pytest.approx([0.1, 0.2, 0.6])
            assert rollout.finish_reason == "stop" and rollout.logprobs.tolist() == [-0.5] * 8


def test_the_request_carries_ids_seeds_and_no_settings_of_the_server_s_own(served) -> None:
    behaviour, make = served
    make(url=make().url + "/v1/", api_key="key").generate(prompts(1), SAMPLING)
    assert sorted(r["seed"] for r in behaviour.requests) == sorted(request_seed(5, 40, k) for k in (0, 1))
    request = behaviour.requests[0]
    assert request["prompt"] == list(prompts(1)[0].token_ids) and request["model"] == "judge"
    assert request["logprob_token_ids"] == sorted([ONE, TWO, THREE])
    assert request["stop_token_ids"] == [TOKENIZER.eos_token_id]
    assert (request["top_k"], request["min_p"], request["repetition_penalty"]) == (0, 0.0, 1.0)
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (1.0, 1.0, 20)
    assert behaviour.headers[0]["Authorization"] == "Bearer key"


def test_a_score_is_forced_over_the_server_too(served) -> None:
    behaviour, make = served
    start = ids(f"good text {ANCHOR}")
    behaviour.model = lambda prompt: (ids("2 <eos>") if prompt[-len(start) :] == start else ids("good text <eos>"), ROW)
    ((got, _),) = score_prompts(make(), prompts(1), SAMPLING, reader=READER)
    assert got.forced and got.decoded == 2.0 and got.expected == pytest.approx(2.3, abs=1e-6)


def test_labels_of_several_tokens_are_read_in_requests_of_one_token(served) -> None:
    """p("good") = 0.5 (1 - 0.3) and p("good text") = 0.5 * 0.3, though the response wrote "bad"."""
    behaviour, _ = served
    bound = bind_scale(ScoreScale.parse("1=bad,2=good,3=good text"), TOKENIZER)
    reader = ScoreReader.build(bound, TOKENIZER, [TOKENIZER.eos_token_id])
    bad, good, text = ids("bad good text")

    def model(prompt):
        if prompt[-1] == good:
            return ids("a"), {bad: 0.1, good: 0.1, text: 0.3}
        return ids(f"a . {ANCHOR} bad <eos>"), {bad: 0.2, good: 0.5, text: 0.05}

    behaviour.model = model
    with completion_server(behaviour) as url:
        backend = ServerBackend(url, reader=reader)
        sampling = Sampling(n=1, temperature=0.0, top_p=1.0, max_new_tokens=20)
        ((got,),) = score_prompts(backend, prompts(1), sampling, reader=reader)
        backend.close()
    assert [math.exp(p) for p in got.label_logprobs] == pytest.approx([0.2, 0.35, 0.15], abs=1e-6)
    assert got.expected == pytest.approx(0.2 + 0.7 + 0.45, abs=1e-6) and got.decoded == 1.0
    assert [r["max_tokens"] for r in behaviour.requests] == [20, 1]
    # One that is left out makes the labels missing that need it.
    behaviour.only_top = 2
    with completion_server(behaviour) as url:
        backend = ServerBackend(url, reader=reader)
        behaviour.model = lambda prompt: (
            model(prompt) if prompt[-1] != good else (ids("a"), {bad: 0.4, good: 0.4, text: 0.1})
        )
        ((got,),) = score_prompts(backend, prompts(1), sampling, reader=reader)
        backend.close()
    assert got.label_logprobs[0] == pytest.approx(math.log(0.2), abs=1e-6) and got.label_logprobs[1:] == (None, None)


def test_labels_that_the_server_leaves_out_are_missing(served, caplog) -> None:
    behaviour, make = served
    behaviour.only_top = 2
    ((first, second),) = score_prompts(make(), prompts(1), SAMPLING, reader=READER)
    assert first.label_logprobs[0] is None and first.label_logprobs[2] == pytest.approx(math.log(0.6), abs=1e-6)
    assert first.expected is second.expected is None and first.decoded == 3.0
    assert [r.message for r in caplog.records if "count as missing" in r.message].__len__() == 1


def test_what_may_pass_is_tried_again(served, no_waiting) -> None:
    behaviour, make = served
    behaviour.failures = [(503, "starting"), (429, '{"error": {"message": "too many"}}')]
    sampling = Sampling(n=1, temperature=0.0, top_p=1.0, max_new_tokens=20)
    assert len(make(concurrency=1).generate(prompts(1), sampling)) == 1
    assert len(behaviour.requests) == 3 and no_waiting == [0.5, 1.0]


@pytest.mark.parametrize(
    ("failures", "match"),
    [
        ([(503, "starting")] * 3, "in 3 attempts; the last one: status 503: starting"),
        ([(400, '{"error": {"message": "no such field"}}')], "refuses with status 400: no such field"),
        ([(200, "<html>")], "not JSON"),
        ([(200, '{"choices": []}')], "needs a server that returns both"),
        ([(200, '{"choices": [{"token_ids": [1], "finish_reason": "stop", "logprobs": null}]}')], "returns both"),
    ],
)
def test_what_does_not_pass_is_an_error_with_the_servers_words(served, failures, match: str) -> None:
    behaviour, make = served
    behaviour.failures = list(failures)
    with pytest.raises(ServerError, match=match):
        make(retries=2, concurrency=1).generate(prompts(1), SAMPLING)


def test_token_ids_may_come_as_tokens_but_must_come(served) -> None:
    behaviour, make = served
    answer = behaviour.answer

    def drop(request):
        made = answer(request)
        made["choices"][0]["token_ids"] = None
        return made

    behaviour.answer = drop
    ((rollout, _),) = (group.rollouts for group in make().generate(prompts(1), SAMPLING))
    assert rollout.token_ids.tolist() == ids(f"good {ANCHOR} 3 <eos>")
    behaviour.without_ids = True
    with pytest.raises(ServerError, match="without token ids"):
        make().generate(prompts(1), SAMPLING)


def test_impossible_requests_are_refused_before_they_are_sent(served) -> None:
    behaviour, make = served
    with pytest.raises(JudgeError, match="does not serve 'other'; it serves judge"):
        make(model="other")
    with pytest.raises(JudgeError, match="exceeds the 200 of the server"):
        make().generate([Prompt(token_ids=(3,) * 190, label=1.0, row=0, text="")], SAMPLING)
    with pytest.raises(EngineSpecError, match="processed_logprobs"):
        make().generate(prompts(1), Sampling(n=1, temperature=0.7, top_p=1.0, max_new_tokens=5))
    with pytest.raises(JudgeError, match="http://"):
        make(url="localhost:8000")
    assert behaviour.requests == []


def test_a_server_that_is_not_there(no_waiting) -> None:
    with pytest.raises(ServerError, match=r"did not answer in 3 attempts.*ConnectError"):
        ServerBackend("http://127.0.0.1:9", reader=READER, retries=2)
    assert no_waiting == [0.5, 1.0]
