"""The raters' agreement against numpy and SciPy, worked out row by row."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from real_openrlhf.data.agreement import agreement, agreement_lines, spread


def test_each_rater_is_held_against_the_mean_of_the_others() -> None:
    table = np.asarray([[1, 2, 1], [3, 3, 5], [4, 2, 4], [5, 4, 5], [2, 1, 4]], dtype=float)
    found = agreement([dict(zip("abc", row)) for row in table.tolist()])
    assert found is not None and found["rows"] == 5
    pearsons = []
    for k, name in enumerate("abc"):
        others = np.delete(table, k, axis=1).mean(axis=1)
        pearsons.append(np.corrcoef(table[:, k], others)[0, 1])
        ranks = [stats.rankdata(table[:, k]), stats.rankdata(others)]
        assert found["raters"][name]["pearson"] == pytest.approx(pearsons[-1])
        assert found["raters"][name]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["pearson"] == pytest.approx(np.mean(pearsons))
    assert found["spread"] == pytest.approx(table.std(axis=1, ddof=1).mean())
    assert len(set(np.round(pearsons, 6))) == 3  # the raters do differ


def test_raters_need_not_rate_every_row() -> None:
    rows = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.0}, {"b": 1.0, "c": 1.0}, {"a": 3.0, "b": 5.0}, {"c": 4.0}]
    found = agreement(rows)
    assert found is not None and found["rows"] == 4  # nobody else rated the last one
    assert {name: one["rows"] for name, one in found["raters"].items()} == {"a": 3, "b": 4, "c": 1}
    assert found["raters"]["a"]["pearson"] == pytest.approx(np.corrcoef([1, 2, 3], [2, 2, 5])[0, 1])
    assert found["raters"]["c"]["pearson"] is None  # one row
    assert found["pearson"] == pytest.approx((found["raters"]["a"]["pearson"] + found["raters"]["b"]["pearson"]) / 2)


def test_what_is_undefined_is_none() -> None:
    assert agreement([{"a": 1.0}, {"a": 2.0}]) is None and agreement([]) is None
    constant = agreement([{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}])
    assert constant is not None and constant["pearson"] is None and constant["spearman"] is None
    assert "Pearson undefined" in agreement_lines({"test": {"": constant}})[0]
    assert spread({"a": 3.0}) is None and spread({"a": 3.0, "b": 5.0}) == pytest.approx(np.std([3, 5], ddof=1))
