"""Packed groups equal separate rows through transformers' own forward: log-probs and every gradient."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from real_openrlhf.actors.policy.logprob_head import Request
from real_openrlhf.actors.policy.model import PolicyModel, _liger_knows, accept_packed_rows, outputs_of
from real_openrlhf.actors.policy.trainer import loss_inputs
from real_openrlhf.algo.batch import RealBatch, Row, collate, denominators_of, rows_of
from real_openrlhf.algo.label_trie import TokenTrie
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.packing import micro_batches
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.types import LossInputs
from real_openrlhf.common.device import Device
from real_openrlhf.common.errors import RunError
from tests.helpers.algo_factory import make_group, make_rollout, make_train_group, plain_rows
from tests.unit.actors.policy.test_prompt_attention import Operators

SCALE = ScoreScale.parse("1-3")  # tokens 1, 2, 3
VALUES = SCALE.tensor()
EOS = 0
VOCABULARY = 37
TEMPERATURE = 0.8
OPTIONS = LossOptions(ratio="clip", entropy_coef=0.1)
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=EOS,
    pad_token_id=None,
    initializer_range=0.3,
)
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_untied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "num_key_value_heads": 1}),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "qwen3_window": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}


def make_model(kind: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    config_class, model_class, options = MODELS[kind]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SIZES, **options, **changes}, attn_implementation=attention))
    accept_packed_rows(model)
    return model


def make_rows() -> list[Row]:
    """Three ragged groups: prompts with end-of-text inside, rollouts without a score, one of a single token."""
    specs: list[tuple[list[int], list[tuple[list[int], int | None]]]] = [
        ([5, EOS, 7, 8, 9, 10, 11, 12, 13], [([20, 21, 2, EOS], 2), ([22, 1], 1), ([23, EOS, 4, 24, 3], 4)]),
        ([EOS, 5], [([23, 24, 25, 26, 27, 3], 5), ([EOS, EOS, 4], None), ([2], 0), ([9, 9, 9], None)]),
        ([30], [([2], 0), ([31, 32], None)]),
    ]
    draws = torch.Generator().manual_seed(3)
    groups = []
    for prompt, responses in specs:
        rollouts = [
            replace(
                make_rollout(ids, position=p, label=None if p is None else 0),
                logprobs=-3 * torch.rand(len(ids), generator=draws),
            )
            for ids, p in responses
        ]
        names = ("cot", "score", "squared_error", "likelihood")
        drawn = {name: torch.randn(len(rollouts), generator=draws).tolist() for name in names}
        groups.append(make_train_group(make_group(prompt, rollouts, label=1.75), SCALE, **drawn))
    return rows_of(groups)


ROWS = make_rows()
COUNTS = denominators_of(ROWS, trains_score_token=True)


@dataclass
class Result:
    """What one path found over all rows: log-probs by rollout, the loss, gradients by parameter."""

    logprobs: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)


def add(result: Result, rows: Sequence[Row], inputs: LossInputs) -> None:
    out = policy_loss(inputs, options=OPTIONS, denominators=COUNTS)
    out.loss.backward()
    result.loss += float(out.loss.detach())
    for i, row in enumerate(rows):
        result.logprobs[id(row.rollout)] = inputs.token_logprobs[i, : row.length].detach()
        result.labels[id(row.rollout)] = inputs.label_logprobs[i].detach()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: Any, batch: RealBatch) -> LossInputs:
    """Padded rows, transformers' own forward, whole logits, torch's log-softmax."""
    ids, mask, columns = plain_rows(batch)
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask.long(), position_ids=places, use_cache=False).logits[:, columns]
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)
    tokens = logprobs.gather(-1, batch.response_ids[..., None])[..., 0].masked_fill(~batch.response_mask, 0.0)
    positions = batch.score_mask.long().argmax(1).tolist()
    labels = [logprobs[i, p, 1:4] if batch.readable[i] else logprobs.new_zeros(3) for i, p in enumerate(positions)]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return loss_inputs(batch, tokens, torch.stack(labels), VALUES, entropy)


def plain_result(model: Any) -> Result:
    result = Result()
    add(result, ROWS, plain(model, collate(ROWS)))
    result.gradients = gradients(model)
    model.zero_grad()
    return result


def packed_result(model: Any, batches: Sequence[Sequence[Row]], max_bytes: int = 2**20) -> Result:
    result = Result()
    for rows in batches:
        batch = collate(rows)
        out = outputs_of(model, batch, temperature=TEMPERATURE, max_bytes=max_bytes, entropy_grad=True)
        add(result, rows, loss_inputs(batch, out.token_logprobs, out.label_logprobs, VALUES, out.entropy))
    result.gradients = gradients(model)
    model.zero_grad()
    return result


def assert_equal(got: Result, want: Result, tolerance: float = 1e-5) -> None:
    assert got.loss == pytest.approx(want.loss, rel=tolerance)
    for name in ("logprobs", "labels"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert mine.keys() == theirs.keys() and len(mine) == len(ROWS)
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=tolerance, atol=tolerance)
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        difference = float((got.gradients[name] - gradient).norm() / gradient.norm())
        assert difference < tolerance, f"{name}: {difference}"


# Everything at once; one group at a time; groups divided by rollouts; by tokens; every rollout alone.
@pytest.mark.parametrize("bounds", [(99, 999), (4, 20), (2, 999), (99, 15), (1, 999)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_and_gradients_equal_separate_rows(kind: str, bounds: tuple[int, int]) -> None:
    model = make_model(kind)
    batches = micro_batches(ROWS, max_rollouts=bounds[0], max_tokens=bounds[1])
    assert (len(batches) == 1) == (bounds == (99, 999)) and (len(batches) == len(ROWS)) == (bounds[0] == 1)
    want = plain_result(model)
    assert_equal(packed_result(model, batches), want)
    # The numbers vary enough for the comparison to mean something.
    assert torch.cat(list(want.logprobs.values())).std() > 0.3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_bytes", [8 * 4 * VOCABULARY, 8 * 3 * 4 * VOCABULARY])
def test_chunks_of_logits(attention: str, max_bytes: int) -> None:
    model = make_model("llama_tied", attention)
    assert_equal(packed_result(model, [ROWS], max_bytes), plain_result(model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_eager_alone_runs_the_unfused_kernel(attention: str) -> None:
    model = make_model("llama_tied", attention)
    with Operators() as ran:
        outputs_of(model, collate(ROWS), temperature=1.0, max_bytes=2**20)
    assert ran.fused is (attention == "sdpa")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama_tied", "mistral_window"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    model = make_model(kind)
    want = plain_result(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batches = micro_batches(ROWS, max_rollouts=4, max_tokens=999)
    assert_equal(packed_result(model, batches), want)
    assert len(calls) == 2 * len(batches)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_adapters(reentrant: bool | None) -> None:
    model = make_model("qwen3")
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    want = plain_result(adapted)
    assert want.gradients and all("lora" in name for name in want.gradients)
    if reentrant is not None:
        adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
        adapted.train()
    assert_equal(packed_result(adapted, micro_batches(ROWS, max_rollouts=4, max_tokens=999)), want)


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    model = get_peft_model(make_model("llama_untied"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(RunError, match=r"--ds\.lora\.target_modules"):
        packed_result(model, [ROWS])


def test_bf16() -> None:
    """As close to the exact result as separate rows are."""
    exact = plain_result(make_model("qwen3"))
    narrow = make_model("qwen3").to(torch.bfloat16)
    apart, packed = plain_result(narrow), packed_result(narrow, [ROWS])

    def error(result: Result) -> tuple[float, float]:
        gaps = torch.cat([result.logprobs[k] - v for k, v in exact.logprobs.items()])
        wrong = [(result.gradients[k].float() - v).norm() / v.norm() for k, v in exact.gradients.items()]
        return float(gaps.abs().mean()), float(torch.stack(wrong).mean())

    assert packed.logprobs[id(ROWS[0].rollout)].dtype == torch.float32
    for mine, theirs in zip(error(packed), error(apart)):
        assert 0 < mine < 2 * theirs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_labels_of_several_tokens_equal_products_of_plain_forwards(temperature: float) -> None:
    """Values and gradients of E[score], on "1", "2", "1.5" as tokens [1], [2], [1, 4, 5]; float64, norms in fp32."""
    model = make_model("llama_tied").double()
    trie, values = TokenTrie(((1,), (1, 4, 5), (2,))), torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    groups = []
    for prompt, responses in [([5, EOS, 7], [([20, 21, 2, EOS], 2), ([22, 1], 1)]), ([9], [([23, 1, 4, 5, 6], 1)])]:
        rollouts = [
            replace(make_rollout(ids, position=p, label=0), score_rows=ScoreRows.of(trie, ids, p))
            for ids, p in responses
        ]
        groups.append(make_train_group(make_group(prompt, rollouts), SCALE))
    rows = rows_of(groups)
    labels = outputs_of(model, collate(rows), temperature=temperature, max_bytes=2**20).label_logprobs
    (labels.exp() @ values).sum().backward()
    got = gradients(model)
    model.zero_grad()
    for i, row in enumerate(rows):
        before = torch.cat([row.group.group.prompt_ids, row.rollout.token_ids[: row.rollout.reading.position]]).tolist()

        def after(*tokens: int, before: list[int] = before) -> Tensor:
            return (model(torch.tensor([[*before, *tokens]])).logits[0, -1] / temperature).softmax(-1)

        at, one = after(), after(1)
        on = one[4] * after(1, 4)[5]
        exact = torch.stack([at[1] * (1 - on), at[1] * on, at[2]])
        torch.testing.assert_close(labels[i].exp(), exact, rtol=0, atol=1e-6)
        (exact @ values).backward()
    for name, gradient in gradients(model).items():
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-6, name
    assert max(float(g.abs().max()) for g in got.values()) > 1e-3


def test_padded_candidates_ask_for_no_token_and_are_minus_infinity() -> None:
    """A network that looks its picks up with `gather`, which takes no token -1."""
    trie = TokenTrie(((1,), (1, 4, 5), (2,)))  # nodes of two children, of one, and of one
    rollout = replace(make_rollout([20, 2], position=1, label=0), score_rows=ScoreRows.of(trie, [20, 2], 1))
    batch = collate(rows_of([make_train_group(make_group([5, 7], [rollout]), SCALE)]))
    torch.manual_seed(0)
    logprobs = torch.randn(len(batch.logit_index), VOCABULARY).log_softmax(-1)

    def network(*, request: Request, **_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        picks = logprobs[request.row].gather(1, request.token[:, None])[:, 0]
        return picks, logprobs.new_zeros(len(logprobs)), logprobs.new_zeros(3, 0)

    got = outputs_of(network, batch, temperature=1.0, max_bytes=2**20).candidate_logprobs.tolist()
    at = [logprobs[row].tolist() for row in batch.score_row]
    assert got == [[at[0][1], at[0][2]], [at[1][4], -math.inf], [at[2][5], -math.inf]]


def test_a_batch_without_any_score() -> None:
    rows = [row for row in ROWS if row.rollout.reading.position is None]
    model = make_model("llama_tied")
    out = outputs_of(model, collate(rows), temperature=1.0, max_bytes=2**20)
    assert out.label_logprobs.shape == (3, 3) and not out.label_logprobs.any()
    assert not out.entropy.requires_grad
    (out.label_logprobs.sum() + out.token_logprobs.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_separate_copy_of_the_prompt_is_computed() -> None:
    model = make_model("llama_tied")
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    outputs_of(model, collate(ROWS), temperature=1.0, max_bytes=2**20)
    assert seen == [9 + 2 + 1 + sum(row.length for row in ROWS)]


# -- loading, and models that are refused ---------------------------------------------------------------------


def load(folder: Path, attention: str = "sdpa", liger: bool | None = False) -> PolicyModel:
    return PolicyModel(
        str(folder),
        device=Device(name="cpu", dtype_name="fp32"),
        attn_implementation=attention,
        ds_config={"zero_optimization": {"stage": 2}},
        temperature=TEMPERATURE,
        max_logit_bytes=2**20,
        use_liger_kernel=liger,
    )


@pytest.mark.parametrize("kind", ["llama_tied", "mistral_window"])
def test_loading_and_saving(kind: str, tmp_path: Path) -> None:
    make_model(kind).save_pretrained(tmp_path / "start")
    model = load(tmp_path / "start")
    assert model.model.config.use_cache is False and model.model.dtype == torch.float32
    model.check_packed_rows()
    outputs = model(collate(ROWS))
    assert outputs.token_logprobs.dtype == outputs.entropy.dtype == torch.float32 and outputs.moments is None
    model.model.save_pretrained(tmp_path / "end")
    again = MODELS[kind][1].from_pretrained(tmp_path / "end")
    assert type(again.lm_head) is torch.nn.Linear and again.config.architectures == [MODELS[kind][1].__name__]
    assert (again.model.embed_tokens.weight is again.lm_head.weight) == (kind == "llama_tied")
    for (name, mine), theirs in zip(again.named_parameters(), model.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_scaled_output_layer_is_refused(tmp_path: Path) -> None:
    GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).save_pretrained(tmp_path / "scaled")
    with pytest.raises(RunError, match=r"granite.*differ from its own by"):
        load(tmp_path / "scaled").check_packed_rows()
    GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.0)).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain").check_packed_rows()


def test_log_probs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    make_model("llama_untied").save_pretrained(tmp_path)
    model = load(tmp_path)
    model.check_packed_rows()
    torch.nn.init.constant_(model.model.lm_head.weight[0], math.nan)
    with pytest.raises(RunError, match="differ from its own by nan"):
        model.check_packed_rows()


def test_capped_attention_is_refused() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=50.0, sliding_window=64))
    accept_packed_rows(model)
    with pytest.raises(RunError, match="Gemma2Attention asks for 'softcap'"):
        outputs_of(model, collate(ROWS), temperature=1.0, max_bytes=2**20)


def test_attention_of_another_kind_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(RunError, match="llama models have chunked_attention"):
        accept_packed_rows(model)


class FakeLiger:
    """liger-kernel needs a GPU: what is asked of it, by the names of its release 0.8.5."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: set[str]) -> None:
        self.asked: dict[str, object] = {}
        transformers, patches = ModuleType("liger_kernel.transformers"), ModuleType("patches")
        transformers.AutoLigerKernelForCausalLM = self  # type: ignore[attr-defined]
        patches.MODEL_TYPE_TO_APPLY_LIGER_FN = dict.fromkeys(kinds)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)

    def from_pretrained(self, path: str, *, fused_linear_cross_entropy: bool, **kwargs: object) -> PreTrainedModel:
        self.asked = {"fused_linear_cross_entropy": fused_linear_cross_entropy, **kwargs}
        return LlamaForCausalLM.from_pretrained(path, **kwargs)


def test_liger_layers_leave_the_output_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama_tied").save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel", None)
        with pytest.raises(RunError, match=r"--ds\.use_liger_kernel: .*pip install liger-kernel"):
            load(tmp_path, liger=True)
    with monkeypatch.context() as patch:
        FakeLiger(patch, {"gemma"})
        with pytest.raises(RunError, match="Liger has no kernels for llama models"):
            load(tmp_path, liger=True)
    liger = FakeLiger(monkeypatch, {"llama"})
    load(tmp_path, liger=True).check_packed_rows()
    assert liger.asked["fused_linear_cross_entropy"] is False and liger.asked["trust_remote_code"] is False


def test_liger_by_itself_is_taken_only_on_a_gpu_and_where_it_knows_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama_tied").save_pretrained(tmp_path)
    for kinds, known in (({"llama"}, True), ({"gemma"}, False)):
        with monkeypatch.context() as patch:
            liger = FakeLiger(patch, kinds)
            assert _liger_knows(str(tmp_path)) is known
            assert not load(tmp_path, liger=None).use_liger_kernel and not liger.asked
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert not _liger_knows(str(tmp_path))
