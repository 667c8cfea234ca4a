"""How prompts are dealt to engines, on handles that answer at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from real_openrlhf.data.prompt import Prompt
from real_openrlhf.run import engine_handles
from real_openrlhf.run.engine_handles import generate_on


class Engine:
    """Answers a prompt with its row."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.generate = SimpleNamespace(remote=self._generate)

    def _generate(self, prompts: list[Prompt], sampling: str) -> list[Any]:
        assert sampling == "sampling"
        self.rows += [prompt.row for prompt in prompts]
        return [f"group {prompt.row}" for prompt in prompts]


def deal(monkeypatch: pytest.MonkeyPatch, lengths: list[int], n_engines: int) -> list[list[int]]:
    """The rows that each engine got, in its order; results must come back in the prompts'."""
    monkeypatch.setattr(engine_handles.ray, "get", lambda refs: refs)
    engines = [Engine() for _ in range(n_engines)]
    wanted = [Prompt(token_ids=(5,) * n, label=1.0, row=10 + i, text="") for i, n in enumerate(lengths)]
    got = generate_on(engines, wanted, "sampling")  # type: ignore[arg-type]
    assert got == [f"group {10 + i}" for i in range(len(lengths))]
    return [engine.rows for engine in engines]


def test_the_longest_prompts_go_first_and_equals_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deal(monkeypatch, [3, 9, 4, 9, 1], 1) == [[11, 13, 12, 10, 14]]


def test_engines_take_turns_so_that_each_gets_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deal(monkeypatch, [1, 2, 3, 4, 5, 6, 7], 3) == [[16, 13, 10], [15, 12], [14, 11]]


def test_an_engine_without_a_prompt_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deal(monkeypatch, [2], 3) == [[10], [], []]
    assert deal(monkeypatch, [], 2) == [[], []]


def test_given_tokens_of_a_response_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_handles.ray, "get", lambda refs: refs)
    engine = Engine()
    wanted = [
        Prompt(token_ids=(5,) * 3, label=1.0, row=0, text=""),
        Prompt(token_ids=(5,) * 2, label=1.0, row=1, text="", given_ids=(6, 7)),
    ]
    assert generate_on([engine], wanted, "sampling") == ["group 0", "group 1"]  # type: ignore[arg-type]
    assert engine.rows == [1, 0]
