"""The one list of objectives."""

from __future__ import annotations

from dataclasses import is_dataclass

import pytest

from real_openrlhf.algo.objectives import OBJECTIVES, make_objective, objective_class
from real_openrlhf.algo.objectives.real import RealObjective

SETTINGS = {
    "lam": 2.0,
    "beta": 0.5,
    "answer_reward": "prob",
    "standardise": False,
    "clip": None,
    "tolerance": 0.1,
    "invalid_penalty": 1.0,
    "renormalise": True,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_list_is_there(name: str) -> None:
    cls = objective_class(name)
    assert is_dataclass(cls) and isinstance(cls.trains_score_token, bool)


def test_an_objective_gets_the_settings_that_it_reads() -> None:
    assert make_objective("real", {**SETTINGS, "what another one reads": 3}) == RealObjective(**SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="lam"):
        make_objective("real", {})
