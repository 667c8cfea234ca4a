from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from real_openrlhf.actors.engine.spec import (
    EngineSpec,
    EngineSpecError,
    check_sampling,
    forced_prefixes,
    logprobs_mode_for,
    make_rollout,
    request_seed,
    with_forced,
)
from real_openrlhf.algo.bound_scale import BoundAnchor, BoundScale, bind_scale
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.device import Device


class Words:
    """One token per word: <eos> is 0, "A" 1, "B" 2, "is" 3, then the digits 1 .. 5 as 4 .. 8."""

    words = ("<eos>", "A", "B", "is", "1", "2", "3", "4", "5")

    def encode(self, text, *, add_special_tokens):
        return [self.words.index(word) for word in text.split()]

    def decode(self, token_ids, **_):
        return " ".join(self.words[i] for i in token_ids)


@pytest.fixture
def bound():
    return bind_scale(ScoreScale.parse("1-3"), Words(), ["is "])


@pytest.fixture
def spec(bound):
    return EngineSpec(model="m", device=Device(name="cpu", dtype_name="fp32"), bound=bound, max_model_len=8)


def test_spec_refuses(spec):
    for change, says in [
        ({"load_format": "pt"}, "load_format"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
    ]:
        with pytest.raises(EngineSpecError, match=says):
            replace(spec, **change)
    assert spec.read_token_ids == [4, 5, 6]


@pytest.mark.parametrize("n_labels", [128, 129])
def test_at_most_128_read_tokens(spec, n_labels):
    scale = ScoreScale.parse(f"1-{n_labels}")
    bound = BoundScale(scale, (BoundAnchor("is ", "is ", tuple((i,) for i in range(n_labels))),))
    if n_labels <= 128:
        assert len(replace(spec, bound=bound).read_token_ids) == 128
    else:
        with pytest.raises(EngineSpecError, match="129 different tokens"):
            replace(spec, bound=bound)


def test_logprobs_mode_for():
    assert logprobs_mode_for(1.0, 1.0) == logprobs_mode_for(1.0, 0.9) == logprobs_mode_for(0.0, 0.9) == "raw_logprobs"
    assert logprobs_mode_for(0.7, 1.0) == "processed_logprobs"
    with pytest.raises(EngineSpecError, match=r"temperature 0\.7 with top_p 0\.9"):
        logprobs_mode_for(0.7, 0.9)


@pytest.mark.parametrize(
    ("mode", "change", "says"),
    [
        ("raw_logprobs", {"temperature": 0.7}, "at temperature 1"),
        ("processed_logprobs", {"top_p": 0.9}, "use top_p 1"),
        ("raw_logprobs", {"temperature": 0.0}, "4 times"),
        ("raw_logprobs", {"temperature": -1.0}, "temperature must be"),
        ("processed_logprobs", {"temperature": 0.001}, "temperature must be"),
        ("processed_logprobs", {"temperature": float("nan")}, "temperature must be"),
        ("raw_logprobs", {"top_p": 0.0}, "top_p must"),
        ("raw_logprobs", {"n": 0}, "at least 1"),
        ("raw_logprobs", {"max_new_tokens": 0}, "at least 1"),
        ("raw_logprobs", {}, None),
        ("raw_logprobs", {"top_p": 0.9}, None),
        ("raw_logprobs", {"temperature": 0.0, "n": 1, "top_p": 0.9}, None),
        ("processed_logprobs", {"temperature": 0.7}, None),
        ("processed_logprobs", {"temperature": 0.0, "n": 1, "top_p": 0.9}, None),
    ],
)
def test_check_sampling(mode, change, says):
    sampling = replace(Sampling(n=4, temperature=1.0, top_p=1.0, max_new_tokens=8), **change)
    if says is None:
        check_sampling(sampling, mode)
    else:
        with pytest.raises(EngineSpecError, match=says):
            check_sampling(sampling, mode)


def test_request_seeds_do_not_collide():
    seeds = {request_seed(s, row, k) for s in range(10) for row in range(20) for k in range(16)}
    assert len(seeds) == 10 * 20 * 16 and all(0 <= s < 2**63 for s in seeds)
    assert request_seed(1, 23, 4) != request_seed(12, 3, 4)


def test_make_rollout_reads_the_right_row_and_columns(bound):
    reader = ScoreReader.build(bound, Words(), {0})
    ids = [1, 3, 5, 0]  # A is 2 <eos>
    table = torch.arange(16, dtype=torch.float32).view(4, 4) * -0.1  # columns: sampled, "1", "2", "3"
    rollout = make_rollout(reader, bound.read_token_ids, ids, table.flatten().tolist(), "stop")
    assert rollout.token_ids.tolist() == ids and rollout.finish_reason == "stop" and rollout.text == "A is 2 <eos>"
    torch.testing.assert_close(rollout.logprobs, table[:, 0])
    assert (rollout.reading.position, rollout.reading.label_index, rollout.cot_length) == (2, 1, 2)
    assert rollout.score_rows.position.tolist() == [2] and rollout.score_rows.token_ids.tolist() == [[4, 5, 6]]
    torch.testing.assert_close(rollout.score_logprobs, table[2:3, 1:])


def test_make_rollout_with_an_anchor_that_orders_tokens_otherwise(bound):
    other = BoundScale(bound.scale, (BoundAnchor("is ", "is", ((6,), (4,), (5,))),))
    reader = ScoreReader.build(other, Words(), {0})
    table = torch.tensor([[-1.0, -1.4, -1.5, -1.6], [-2.0, -2.4, -2.5, -2.6]])
    rollout = make_rollout(reader, other.read_token_ids, [3, 6], table.flatten().tolist(), "length")
    torch.testing.assert_close(rollout.score_logprobs, torch.tensor([[-2.6, -2.4, -2.5]]))


def test_make_rollout_without_a_score(bound):
    reader = ScoreReader.build(bound, Words(), {0})
    rollout = make_rollout(reader, bound.read_token_ids, [1, 2], [-1.0] * 8, "length")
    assert rollout.reading.reason == "no_anchor" and rollout.score_logprobs.shape == (0, 3) and rollout.cot_length == 2


def test_make_rollout_refuses_broken_output(bound):
    reader = ScoreReader.build(bound, Words(), {0})
    with pytest.raises(RuntimeError, match="7 log-probs for 2 tokens"):
        make_rollout(reader, bound.read_token_ids, [1, 2], [-1.0] * 7, "stop")
    with pytest.raises(RuntimeError, match="not finite"):
        make_rollout(reader, bound.read_token_ids, [1], [float("nan"), -1.0, -1.0, -1.0], "stop")


def several() -> tuple[ScoreReader, list[int]]:
    """ "1" is [4], "2" is [5], "10" is written as the words "1 5", [4, 8]."""
    bound = bind_scale(ScoreScale.parse("1,2,10=1 5"), Words(), ["is "])
    return ScoreReader.build(bound, Words(), {0}), bound.read_token_ids


def test_a_label_that_was_not_written_is_asked_for():
    reader, read_ids = several()
    assert read_ids == [4, 5, 8]
    table = torch.tensor([[-1.0, -9.0, -9.0, -9.0], [-1.0, -9.0, -9.0, -9.0], [-0.5, -0.7, -0.5, -3.0], [-1.0] * 4])
    rollout = make_rollout(reader, read_ids, [1, 3, 5, 0], table.flatten().tolist(), "stop")  # A is 2 <eos>
    assert rollout.reading.label_index == 1 and rollout.score_length == 1
    assert forced_prefixes(rollout) == [[1, 3, 4]]  # A is 1
    assert rollout.score_logprobs[1].isnan().any()  # nothing is made up for it
    whole = with_forced(rollout, read_ids, [[-2.0, -3.1, -3.2, -0.4]])
    torch.testing.assert_close(whole.score_logprobs, torch.tensor([[-0.7, -0.5], [-0.4, float("-inf")]]))
    p = torch.tensor([-0.7, -0.5, -0.4]).exp()
    labels = whole.score_rows.label_logprobs(whole.score_logprobs)[0].exp()
    torch.testing.assert_close(labels, torch.stack([p[0] * (1 - p[2]), p[1], p[0] * p[2]]))
    with pytest.raises(RuntimeError, match="1 forced prefixes"):
        with_forced(rollout, read_ids, [])
    with pytest.raises(RuntimeError, match="not finite"):
        with_forced(rollout, read_ids, [[float("nan"), -3.1, -3.2, -0.4]])


def test_a_response_that_passes_every_node_asks_for_nothing(bound):
    reader, read_ids = several()
    table = torch.arange(16, dtype=torch.float32).view(4, 4) * -0.1 - 0.1
    for ids, label in ([3, 4, 8, 0], 2), ([3, 4, 0, 0], 0):
        rollout = make_rollout(reader, read_ids, ids, table.flatten().tolist(), "stop")
        assert rollout.reading.label_index == label and rollout.score_length == 2
        assert forced_prefixes(rollout) == []
        torch.testing.assert_close(
            rollout.score_logprobs, torch.tensor([[table[1, 1], table[1, 2]], [table[2, 3], float("-inf")]])
        )
    single = make_rollout(ScoreReader.build(bound, Words(), {0}), bound.read_token_ids, [3, 6], [-1.0] * 8, "stop")
    assert forced_prefixes(single) == []
