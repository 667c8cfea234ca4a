"""The worker's side of the conversation, on a scripted contestant."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from examples.benchmark.protocol import Case, Measured
from examples.benchmark.worker import parse, serve

CASE = Case(prompt=4, response=5, samples=2, micro_batch=1)


class FakeWorker:
    """Fails on prompts of more than 100 tokens."""

    name = "authors"

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def step(self, case: Case, *, seed: int) -> Measured:
        self.seeds.append(seed)
        if case.prompt > 100:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return Measured(
            contestant=self.name,
            case=case,
            seconds={"forward": 0.75, "experience": 0.25},
            total=1.0,
            peak_bytes=7,
            loss=0.5,
            facts={"grad_norm": 2.0},
        )


def converse(*requests: Any) -> tuple[list[dict[str, Any]], bool, FakeWorker]:
    worker, answers = FakeWorker(), io.StringIO()
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in requests)
    restart = serve(worker, io.StringIO(text), answers)  # type: ignore[arg-type]
    return [json.loads(line) for line in answers.getvalue().splitlines()], restart, worker


def test_steps_are_answered_one_line_each_until_quit() -> None:
    step = {"op": "step", "case": CASE.to_json()}
    answers, restart, worker = converse({**step, "seed": 3}, {**step, "seed": 4}, {"op": "quit"}, {**step, "seed": 5})
    assert not restart and worker.seeds == [3, 4] and len(answers) == 2
    assert answers[0] == {
        "contestant": "authors",
        "case": {"prompt": 4, "response": 5, "samples": 2, "micro_batch": 1, "gradient_checkpointing": False},
        "seconds": {"forward": 0.75, "experience": 0.25},
        "total": 1.0,
        "peak_bytes": 7,
        "loss": 0.5,
        "facts": {"grad_norm": 2.0},
        "peaks": {},
    }


def test_the_end_of_the_pipe_ends_the_worker() -> None:
    assert converse()[:2] == ([], False)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"op": "step", "case": {**CASE.to_json(), "prompt": 101}, "seed": 1}, ["authors", "101", "can't allocate"]),
        ({"op": "step", "case": {"prompt": 4}, "seed": 1}, ["authors", "TypeError", "response"]),
        ({"op": "step", "case": CASE.to_json()}, ["authors", "seed"]),
        ({"op": "dance"}, ["authors", "dance"]),
        ("no json", ["authors", "no json"]),
        ("[]", ["authors", "[]"]),
    ],
)
def test_what_fails_is_answered_and_asks_for_a_fresh_process(request_: Any, words: list[str]) -> None:
    answers, restart, _ = converse(request_, {"op": "quit"})
    assert restart and len(answers) == 1
    assert all(word in answers[0]["error"] for word in words), answers


def test_unknown_contestants_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--contestant", "trl", "--model", "m"])
    assert "trl" in capsys.readouterr().err
    assert parse(["--contestant", "openrlhf", "--model", "m", "--seed", "3"]).seed == 3
