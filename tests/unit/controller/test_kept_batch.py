"""What is kept of a batch can be read back with public libraries, and tells which numbers were not finite."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.controller import kept_batch as module
from real_openrlhf.controller.kept_batch import keep_batch
from tests.helpers.algo_factory import random_groups

GROUPS = random_groups(seed=2, n_groups=3, k=2, scale=ScoreScale.parse("1-3"))


def test_it_is_read_back(tmp_path: Path) -> None:
    first = GROUPS[1].group.rollouts[0]
    assert first.logprobs is not None
    bad = replace(first, logprobs=torch.full_like(first.logprobs, math.nan))
    group = replace(GROUPS[1].group, rollouts=(bad, GROUPS[1].group.rollouts[1]))
    groups = [GROUPS[0], replace(GROUPS[1], group=group), GROUPS[2]]
    path = keep_batch(tmp_path, 7, groups, {"loss/total": math.nan, "skipped/rollouts": 1.0, "invalid/rate": None})
    assert path == tmp_path / "not_finite" / "step_7.safetensors"
    tensors = load_file(path)
    for g, kept in enumerate(groups):
        assert tensors[f"{g}/prompt_ids"].equal(kept.group.prompt_ids)
        assert tensors[f"{g}/advantages"].equal(kept.coefficients.advantages)
        for k, rollout in enumerate(kept.group.rollouts):
            assert tensors[f"{g}/{k}/token_ids"].equal(rollout.token_ids)
            torch.testing.assert_close(tensors[f"{g}/{k}/logprobs"], rollout.logprobs, equal_nan=True)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["step"] == 7
    assert facts["metrics"] == {"loss/total": "nan", "skipped/rollouts": 1.0, "invalid/rate": None}
    assert [row["not_finite"] for row in facts["groups"]] == [[], ["1/0/logprobs"], []]
    assert [row["row"] for row in facts["groups"]] == [g.group.row for g in groups]


def test_there_are_not_more_than_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    found = [keep_batch(tmp_path, step, GROUPS, {}) for step in (1, 2, 3)]
    assert found[2] is None and len(list((tmp_path / "not_finite").iterdir())) == 4
    # A step that is made again after a restart.
    assert keep_batch(tmp_path, 2, GROUPS, {}) == found[1]


def test_a_disk_that_does_not_take_it_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "not_finite" / "step_1.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match=r"."):
        keep_batch(tmp_path, 1, GROUPS, {})
