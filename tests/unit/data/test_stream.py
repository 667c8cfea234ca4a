"""The prompt stream: complete epochs, exact resumption, limits."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from real_openrlhf.data.prompt import Prompt
from real_openrlhf.data.row import DataError
from real_openrlhf.data.stream import PromptStream, StreamExhausted


def prompts(n=10):
    return [Prompt(token_ids=(i,), label=float(i), row=i, text=str(i)) for i in range(n)]


def rows(taken):
    return [prompt.row for prompt in taken]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sizes", [(1,), (3,), (7, 2, 5), (10,), (23, 1), (4, 0, 6)])
def test_every_epoch_holds_every_prompt_once(sizes, shuffle):
    stream = PromptStream(prompts(), seed=0, shuffle=shuffle)
    seen = []
    for size in itertools.cycle(sizes):
        assert (stream.epoch, stream.position) == divmod(len(seen), 10)
        taken = stream.take(size)
        assert len(taken) == size
        seen += rows(taken)
        if len(seen) >= 50:
            break
    for epoch in range(5):
        assert Counter(seen[10 * epoch : 10 * epoch + 10]) == Counter(range(10))


def test_the_order_depends_on_seed_and_epoch_not_on_take_sizes():
    whole = rows(PromptStream(prompts(), seed=1).take(40))
    stream = PromptStream(prompts(), seed=1)
    assert [r for size in (7, 13, 1, 19) for r in rows(stream.take(size))] == whole
    epochs = {tuple(whole[i : i + 10]) for i in range(0, 40, 10)}
    assert len(epochs) == 4
    assert whole != rows(PromptStream(prompts(), seed=2).take(40))
    # Seed and epoch must not merely add up.
    assert whole[10:20] != rows(PromptStream(prompts(), seed=2).take(10))


def test_unshuffled_keeps_the_order():
    assert rows(PromptStream(prompts(3), seed=0, shuffle=False).take(7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("before", range(0, 31, 3))
def test_a_restored_stream_goes_on_exactly(before):
    stream = PromptStream(prompts(), seed=4)
    stream.take(before)
    state = json.loads(json.dumps(stream.state_dict()))
    want = rows(stream.take(25))
    other = PromptStream(prompts(), seed=4)
    other.take(17)
    other.load_state_dict(state)
    assert (other.epoch, other.position) == divmod(before, 10)
    assert rows(other.take(25)) == want
    assert other.state_dict() == stream.state_dict()


def test_episodes_end_and_a_refused_take_takes_nothing():
    stream = PromptStream(prompts(), seed=0, num_episodes=2)
    assert stream.remaining == 20
    first = rows(stream.take(16))
    with pytest.raises(StreamExhausted, match=r"5 prompts are wanted, but 4 remain of --train.num_episodes 2"):
        stream.take(5)
    assert (stream.remaining, stream.epoch, stream.position) == (4, 1, 6)
    assert Counter(first + rows(stream.take(4))) == Counter({i: 2 for i in range(10)})
    assert stream.remaining == 0 and stream.take(0) == []
    with pytest.raises(StreamExhausted):
        stream.take(1)
    used_up = stream.state_dict()
    longer = PromptStream(prompts(), seed=0, num_episodes=3)
    longer.load_state_dict(used_up)
    assert longer.remaining == 10
    shorter = PromptStream(prompts(), seed=0, num_episodes=1)
    shorter.load_state_dict(used_up)
    assert shorter.remaining == 0


def test_without_a_limit_nothing_ends():
    stream = PromptStream(prompts(2), seed=0)
    assert stream.remaining is None and len(stream.take(101)) == 101


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptStream(prompts(9), seed=0), "other prompts or labels"),
        (PromptStream(prompts()[::-1], seed=0), "other prompts or labels"),
        (PromptStream(prompts(), seed=1), "with seed 0, this run has seed 1"),
        (PromptStream(prompts(), seed=0, shuffle=False), "with shuffle True, this run has shuffle False"),
    ],
)
def test_a_state_of_another_run_is_refused(other, message):
    with pytest.raises(DataError, match=message):
        other.load_state_dict(PromptStream(prompts(), seed=0).state_dict())
    assert (other.epoch, other.position) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 10}, "prompt 10 of 10"),
        ({"epoch": -1}, "epoch -1"),
        ({"order_sha256": "0"}, "this numpy shuffles differently"),
        ({"epoch": 1}, "this numpy shuffles differently"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    stream = PromptStream(prompts(), seed=0)
    with pytest.raises(DataError, match=message):
        stream.load_state_dict(stream.state_dict() | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"seed": -1}, "seed must not be negative"),
        ({"num_episodes": 0}, "num_episodes must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PromptStream(**({"prompts": prompts(), "seed": 0} | options))


def test_a_negative_take():
    with pytest.raises(ValueError, match="cannot take -1"):
        PromptStream(prompts(), seed=0).take(-1)


def test_prompts_put_back_come_first_and_in_order():
    stream = PromptStream(prompts(), seed=0, shuffle=False)
    taken = stream.take(5)
    stream.put_back(taken[3:])
    stream.put_back(taken[1:2])
    assert rows(stream.take(2)) == [3, 4]
    assert rows(stream.take(4)) == [1, 5, 6, 7]


def test_put_back_counts_as_remaining():
    stream = PromptStream(prompts(), seed=0, num_episodes=1)
    taken = stream.take(8)
    stream.put_back(taken[5:])
    assert stream.remaining == 5
    with pytest.raises(StreamExhausted, match="6 prompts are wanted, but 5 remain"):
        stream.take(6)
    last = stream.take(5)
    assert Counter(rows(taken[:5] + last)) == Counter(range(10))
    assert stream.remaining == 0


def test_put_back_across_the_end_of_an_epoch():
    stream = PromptStream(prompts(), seed=0, num_episodes=2)
    whole = rows(PromptStream(prompts(), seed=0, num_episodes=2).take(20))
    taken = stream.take(12)
    # The last two of epoch 0 and the first two of epoch 1 go back; the position stays where it is.
    stream.put_back(taken[8:])
    assert (stream.epoch, stream.position, stream.remaining) == (1, 2, 12)
    assert rows(stream.take(12)) == whole[8:]
    # And once the last episode is over.
    stream.put_back(taken[:1])
    assert (stream.epoch, stream.remaining) == (2, 1)
    assert rows(stream.take(1)) == whole[:1] and stream.remaining == 0


def test_put_back_nothing():
    stream = PromptStream(prompts(), seed=0)
    before = stream.state_dict()
    stream.put_back([])
    assert stream.state_dict() == before


@pytest.mark.parametrize("row", [10, 3])
def test_put_back_of_a_foreign_prompt(row):
    stream = PromptStream(prompts(), seed=0)
    mine = stream.take(2)
    with pytest.raises(ValueError, match=f"row {row} does not come from this stream"):
        stream.put_back([mine[0], Prompt(token_ids=(99,), label=1.0, row=row, text="")])
    assert stream.state_dict()["returned"] == []


def test_returned_prompts_are_part_of_the_state():
    stream = PromptStream(prompts(), seed=4)
    taken = stream.take(13)
    stream.put_back(taken[9:])
    state = json.loads(json.dumps(stream.state_dict()))
    other = PromptStream(prompts(), seed=4)
    other.put_back(other.take(3))
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert rows(other.take(9)) == rows(stream.take(9))
    # The state is a copy: what was taken since is still in it.
    assert len(state["returned"]) == 4 and stream.state_dict()["returned"] == []


def test_returned_prompts_outlive_a_shorter_run():
    stream = PromptStream(prompts(), seed=0, num_episodes=3)
    stream.put_back(stream.take(15)[12:])
    shorter = PromptStream(prompts(), seed=0, num_episodes=1)
    shorter.load_state_dict(stream.state_dict())
    assert shorter.remaining == 3 and len(shorter.take(3)) == 3 and shorter.remaining == 0


def test_the_row_is_not_the_index():
    # Rows that were skipped leave gaps.
    sparse = [Prompt(token_ids=(i,), label=1.0, row=7 * i, text="") for i in range(5)]
    stream = PromptStream(sparse, seed=1)
    taken = stream.take(5)
    stream.put_back(taken)
    assert stream.take(5) == taken


@pytest.mark.parametrize("index", [10, -1])
def test_a_returned_index_out_of_range_is_refused(index):
    stream = PromptStream(prompts(), seed=0)
    stream.take(3)
    before = stream.state_dict()
    with pytest.raises(DataError, match=f"holds back prompt {index} of 10"):
        stream.load_state_dict(PromptStream(prompts(), seed=0).state_dict() | {"returned": [0, index]})
    assert stream.state_dict() == before
