from __future__ import annotations

import pytest
import torch

from real_openrlhf.algo.score_scale import ScaleError
from real_openrlhf.dropin.settings import DropInError, RealSettings
from real_openrlhf.dropin.tensors import Scores, label_logprobs, read_scores
from tests.helpers.algo_factory import merged_tokenizer, spaced_tokenizer

TOKENIZER = spaced_tokenizer()
VOCABULARY = 64
READER = RealSettings().reader(TOKENIZER, {0})
PROMPTS = ["rate. So the overall score is 9.", "b"]
RESPONSES = ["ab. So the overall score is 4", "good. So the overall score is 7!", "no score"]


def batch(responses: list[str] = RESPONSES, *, end: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts that hold an anchor of their own, responses that may end, padding that looks like a score."""
    rows, starts = [], []
    for i, response in enumerate(responses):
        prompt = TOKENIZER.encode(PROMPTS[i % 2], add_special_tokens=False)
        starts.append(len(prompt))
        rows.append([*prompt, *TOKENIZER.encode(response, add_special_tokens=False), *([0] if end else [])])
    width = max(map(len, rows)) + 2
    sequences = torch.full((len(rows), width), TOKENIZER.encode("4", add_special_tokens=False)[0])
    attention, action = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width - 1)
    for i, (row, start) in enumerate(zip(rows, starts)):
        sequences[i, : len(row)] = torch.tensor(row)
        attention[i, : len(row)] = 1
        action[i, start - 1 : len(row) - 1] = 1
    return sequences, attention, action


def read() -> Scores:
    return read_scores(*batch(), READER)


def text(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.tolist(), skip_special_tokens=False)


def test_scores_are_found_behind_the_prompt_and_before_the_padding() -> None:
    sequences, *_ = batch()
    scores = read()
    assert scores.readable.tolist() == [True, True, False]
    assert scores.sampled.tolist() == [3, -1, -1]  # 7 is off the scale and still readable
    assert [text(sequences[i, c : c + 1]) for i, c in enumerate(scores.column.tolist())][:2] == ["4", "7"]
    assert int(scores.column[2]) == 0
    # Column t of the mask is about the token in column t + 1.
    feedback = [text(sequences[i, 1:][scores.feedback_mask[i]]) for i in range(3)]
    assert feedback == ["ab. So the overall score is ", "good. So the overall score is ", "no score<eos>"]


def test_where_the_action_mask_ends_plays_no_part() -> None:
    sequences, attention, action = batch()
    scores = read()
    again = read_scores(sequences, attention, scores.feedback_mask, READER)
    assert torch.equal(again.feedback_mask, scores.feedback_mask) and torch.equal(again.column, scores.column)
    first = torch.zeros_like(action).scatter(1, action.argmax(1, keepdim=True), 1)
    assert torch.equal(read_scores(sequences, attention, first, READER).column, scores.column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_label_logprobs_are_those_of_the_row_before_the_score(dtype: torch.dtype, temperature: float) -> None:
    scores = read()
    n, width = len(scores.readable), scores.feedback_mask.shape[1] + 1
    logits = torch.randn(n, width, VOCABULARY, dtype=dtype, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    got = label_logprobs(logits, scores, temperature=temperature)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    digits = [TOKENIZER.encode(d, add_special_tokens=False)[0] for d in "12345"]
    for i in (0, 1):
        row = logits[i, int(scores.column[i]) - 1].detach().double() / temperature
        assert got[i].tolist() == pytest.approx((row[digits] - row.exp().sum().log()).tolist(), abs=1e-5)
    assert got[2].tolist() == [0.0] * 5
    got.sum().backward()
    touched = logits.grad.abs().sum(-1).nonzero().tolist()  # type: ignore[union-attr]
    assert touched == [[0, int(scores.column[0]) - 1], [1, int(scores.column[1]) - 1]]


def test_packed_logits_give_the_same() -> None:
    sequences, attention, _ = batch()
    scores = read()
    logits = torch.randn(*sequences.shape, VOCABULARY, generator=torch.Generator().manual_seed(1))
    packed = logits[attention.bool()][None]
    assert packed.shape[0] == 1 and packed.shape[1] < sequences.numel()
    got = label_logprobs(packed, scores, attention_mask=attention)
    assert torch.equal(got, label_logprobs(logits, scores))
    for wrong, mask in ((packed, None), (packed[:, :-1], attention), (logits[0], attention)):
        with pytest.raises(DropInError, match="packed"):
            label_logprobs(wrong, scores, attention_mask=mask)


def test_anchors_of_one_batch_may_differ_in_their_tokens() -> None:
    tokenizer = merged_tokenizer([":"])
    reader = RealSettings(anchors=("score is ", "a:")).reader(tokenizer, {0})
    rows = [tokenizer.encode(t, add_special_tokens=False) for t in ("bb score is 4", "bbbb a:4")]
    width = max(map(len, rows))
    sequences = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    scores = read_scores(sequences, attention, attention[:, 1:], reader)
    assert scores.readable.tolist() == [True, True]
    assert scores.rows.token_ids.tolist() == [
        [tokenizer.encode(f" {d}", add_special_tokens=False)[0] for d in "12345"],
        [tokenizer.encode(d, add_special_tokens=False)[0] for d in "12345"],
    ]


def test_what_does_not_belong_together_is_refused() -> None:
    sequences, attention, action = batch()
    with pytest.raises(DropInError, match=r"action_mask \[N, L - 1\]"):
        read_scores(sequences, attention, attention, READER)
    with pytest.raises(DropInError, match="rollout 1 has no response"):
        read_scores(sequences, attention, action * torch.tensor([[1.0], [0.0], [1.0]]), READER)
    with pytest.raises(ScaleError, match="must be one token"):
        read_scores(sequences, attention, action, RealSettings(scale="1-10").reader(TOKENIZER, {0}))


def test_a_batch_without_any_score() -> None:
    scores = read_scores(*batch(["ab", "a"]), READER)
    got = label_logprobs(torch.zeros(2, scores.feedback_mask.shape[1] + 1, VOCABULARY), scores)
    assert got.tolist() == [[0.0] * 5] * 2
