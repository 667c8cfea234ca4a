"""What the model card's table is made of."""

from __future__ import annotations

from real_openrlhf.run.export import split_metrics


def test_split_metrics() -> None:
    metrics = {"expected/pearson": 0.5, "decoded/pearson": None, "expected/n": 3.0, "mass": 0.9}
    assert split_metrics(metrics) == {
        "expected": {"pearson": 0.5, "n": 3.0},
        "decoded": {"pearson": None},
        "all": {"mass": 0.9},
    }
    assert split_metrics({}) == {}
