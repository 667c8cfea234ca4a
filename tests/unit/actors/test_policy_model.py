"""One forward over a padded batch equals each sequence on its own, with exact log-softmaxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from real_openrlhf.actors.device import Device
from real_openrlhf.actors.policy_model import PolicyModel, PolicyOutputs, outputs_from_logits
from real_openrlhf.algo.batch import RealBatch, Row, collate, rows_of
from real_openrlhf.algo.label_trie import TokenTrie
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from tests.helpers.algo_factory import make_group, make_rollout, make_train_group

SCALE = ScoreScale.parse("1-3")  # tokens 1, 2, 3
EOS = 0  # also the padding id
VOCABULARY = 37
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=EOS,
    pad_token_id=None,
    initializer_range=0.3,
)


def make_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False)).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(path)
    return path


def load(folder: Path, temperature: float) -> PolicyModel:
    return PolicyModel(
        str(folder),
        device=Device(name="cpu", dtype_name="fp32"),
        attn_implementation="sdpa",
        ds_config={"zero_optimization": {"stage": 2}},
        temperature=temperature,
    )


def make_rows() -> list[Row]:
    """Prompts of 1 to 9 tokens, some holding the padding id; two rollouts without a score."""
    specs: list[tuple[list[int], list[tuple[list[int], int | None]]]] = [
        ([5, EOS, 7, 8, 9, 10, 11, 12, 13], [([20, 21, 2, EOS], 2), ([22, 1], 1)]),
        ([EOS, 5], [([23, 24, 25, 26, 27, 3], 5), ([EOS, EOS, 4], None)]),
        ([30], [([2], 0), ([31, 32], None)]),
    ]
    groups = []
    for prompt, responses in specs:
        rollouts = [make_rollout(ids, position=p, label=None if p is None else 0) for ids, p in responses]
        groups.append(make_train_group(make_group(prompt, rollouts), SCALE))
    return rows_of(groups)


def alone(model: PreTrainedModel, row: Row, temperature: float) -> Tensor:
    """[L, V] log-probs that predict the response's tokens, from the unpadded sequence."""
    prompt, response = row.group.group.prompt_ids, row.rollout.token_ids
    logits = model(torch.cat([prompt, response])[None]).logits[0]
    return (logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_padded_batch_equals_its_sequences(folder: Path, temperature: float) -> None:
    model, rows = load(folder, temperature), make_rows()
    batch = collate(rows, pad_id=EOS)
    with torch.no_grad():
        outputs = model(batch)
    n, width = batch.response_ids.shape
    assert outputs.logits.shape == (n, width, VOCABULARY)
    assert outputs.token_logprobs.dtype == outputs.label_logprobs.dtype == outputs.entropy.dtype == torch.float32
    for i, row in enumerate(rows):
        with torch.no_grad():
            exact = alone(model.model, row, temperature)
        length, position = len(exact), row.rollout.reading.position
        tokens = exact.gather(1, row.rollout.token_ids[:, None])[:, 0]
        entropy = -(exact.exp() * exact).sum(-1)
        torch.testing.assert_close(outputs.token_logprobs[i, :length].double(), tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.entropy[i, :length].double(), entropy, rtol=0, atol=1e-5)
        assert not outputs.token_logprobs[i, length:].any() and not outputs.entropy[i, length:].any()
        labels = torch.zeros(3, dtype=torch.float64) if position is None else exact[position, 1:4]
        torch.testing.assert_close(outputs.label_logprobs[i].double(), labels, rtol=0, atol=1e-5)
    # The numbers vary enough for the comparison to mean something.
    assert outputs.token_logprobs[batch.response_mask].std() > 0.3


def test_padding_gets_no_gradient(folder: Path) -> None:
    model, rows = load(folder, 1.0), make_rows()
    batch = collate(rows, pad_id=EOS)
    outputs = model(batch)
    weights = torch.linspace(-1, 1, len(rows))
    (weights @ outputs.token_logprobs.sum(1) + weights @ outputs.label_logprobs.sum(1)).backward()
    padded = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    model.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for weight, row in zip(weights, rows):
        exact = alone(model.model, row, 1.0)
        total = total + weight * exact.gather(1, row.rollout.token_ids[:, None]).sum()
        if row.rollout.reading.position is not None:
            total = total + weight * exact[row.rollout.reading.position, 1:4].sum()
    total.backward()
    for name, parameter in model.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(padded[name], parameter.grad, rtol=0, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_labels_of_several_tokens_equal_products_of_plain_forwards(folder: Path, temperature: float) -> None:
    """Values and gradients of E[score], on "1", "2", "1.5" as tokens [1], [2], [1, 4, 5], in float64."""
    model = load(folder, temperature).double()
    trie, values = TokenTrie(((1,), (1, 4, 5), (2,))), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    groups = []
    for prompt, responses in [([5, EOS, 7], [([20, 21, 2, EOS], 2), ([22, 1], 1)]), ([9], [([23, 1, 4, 5, 6], 1)])]:
        rollouts = [
            replace(make_rollout(ids, position=p, label=0), score_rows=ScoreRows.of(trie, ids, p))
            for ids, p in responses
        ]
        groups.append(make_train_group(make_group(prompt, rollouts), SCALE))
    rows = rows_of(groups)
    batch = collate(rows, pad_id=EOS)
    labels = model(batch).label_logprobs
    (labels.exp() @ values).sum().backward()
    got = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    model.model.zero_grad()
    for i, row in enumerate(rows):
        before = torch.cat([row.group.group.prompt_ids, row.rollout.token_ids[: row.rollout.reading.position]]).tolist()

        def after(*tokens: int, before: list[int] = before) -> Tensor:
            return (model.model(torch.tensor([[*before, *tokens]])).logits[0, -1] / temperature).softmax(-1)

        at, one = after(), after(1)
        on = one[4] * after(1, 4)[5]
        exact = torch.stack([at[1] * (1 - on), at[1] * on, at[2]])
        torch.testing.assert_close(labels[i].exp(), exact, rtol=0, atol=1e-6)
        (exact @ values).backward()
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-9, msg=name)
    assert max(float(g.abs().max()) for g in got.values()) > 1e-3


def test_the_model_does_not_cache_and_is_in_the_devices_dtype(folder: Path) -> None:
    model = load(folder, 1.0)
    assert model.model.config.use_cache is False and model.model.dtype == torch.float32


def random_logits(batch: RealBatch, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (*batch.response_ids.shape, VOCABULARY)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def outputs_of(logits: Tensor, batch: RealBatch, *, entropy_grad: bool = False) -> PolicyOutputs:
    return outputs_from_logits(logits, batch, temperature=0.8, entropy_grad=entropy_grad)


def test_gradients_equal_those_of_exact_log_softmaxes() -> None:
    batch = collate(make_rows(), pad_id=EOS)
    logits, again = random_logits(batch), random_logits(batch)
    outputs = outputs_of(logits, batch, entropy_grad=True)
    assert outputs.token_logprobs.dtype == torch.float64
    weights = torch.linspace(0.5, 1.5, batch.response_ids.numel(), dtype=torch.float64).view(batch.response_ids.shape)
    labels = torch.linspace(-1, 1, 3, dtype=torch.float64)
    loss = (weights * outputs.token_logprobs).sum() + (outputs.label_logprobs @ labels).sum()
    (loss + (weights * outputs.entropy).sum()).backward()

    exact = (again / 0.8).log_softmax(-1)
    mask = batch.response_mask
    tokens = exact.gather(-1, batch.response_ids[..., None])[..., 0]
    entropy = -(exact.exp() * exact).sum(-1)
    want = (weights * tokens)[mask].sum() + (weights * entropy)[mask].sum()
    for rollout, position in zip(batch.score_rows.rollout.tolist(), batch.score_rows.position.tolist()):
        want = want + exact[rollout, position, 1:4] @ labels
    want.backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-10, atol=1e-12)
    assert logits.grad is not None and not logits.grad[~mask].any()


def test_entropy_has_a_gradient_only_on_request() -> None:
    batch = collate(make_rows(), pad_id=EOS)
    without, with_grad = (outputs_of(random_logits(batch), batch, entropy_grad=flag) for flag in (False, True))
    assert not without.entropy.requires_grad and with_grad.entropy.requires_grad
    assert without.token_logprobs.requires_grad and without.label_logprobs.requires_grad
    torch.testing.assert_close(without.entropy, with_grad.entropy.detach(), rtol=0, atol=0)
    with torch.no_grad():
        assert not outputs_of(random_logits(batch), batch, entropy_grad=True).entropy.requires_grad


def test_narrow_logits_are_cast_up_before_anything_is_computed() -> None:
    batch = collate(make_rows(), pad_id=EOS)
    logits = random_logits(batch, torch.bfloat16)
    outputs = outputs_of(logits, batch)
    exact = (logits.detach().double() / 0.8).log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]
    assert outputs.token_logprobs.dtype == torch.float32 and outputs.logits.dtype == torch.bfloat16
    mask = batch.response_mask
    torch.testing.assert_close(outputs.token_logprobs[mask].double(), exact[mask], rtol=0, atol=1e-5)


def test_a_batch_without_any_score() -> None:
    rows = [row for row in make_rows() if row.rollout.reading.position is None]
    batch = collate(rows, pad_id=EOS)
    logits = random_logits(batch)
    outputs = outputs_of(logits, batch)
    assert outputs.label_logprobs.shape == (2, 3) and not outputs.label_logprobs.any()
    (outputs.label_logprobs.sum() + outputs.token_logprobs.sum()).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.any()
