"""Adapters against peft itself: the same start, the same merged weights, and a network that nothing moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from real_openrlhf.actors.policy.lora import (
    ADAPTER,
    LoraError,
    add_adapters,
    check_adapters,
    lora_layers,
    save_adapter,
    weights_of,
    without_adapters,
)
from real_openrlhf.config.schema import LoraConfig

IDS = torch.tensor([[3, 7, 1, 30, 12]])


def lora(**changes: object) -> LoraConfig:
    values: dict[str, object] = {"rank": 4, "alpha": 8, **changes}
    return LoraConfig(**values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name in ("tied", "untied"):
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=name == "tied",
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
    # Its linears are Conv1D: [in, out] instead of [out, in].
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)).save_pretrained(
        root / "gpt2"
    )
    return root


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained(folder: Path, settings: LoraConfig) -> nn.Module:
    """A network whose adapters are no longer what they began as."""
    network = load(folder)
    add_adapters(network, settings, seed=3)
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(network).values():
        weight = layer.lora_B[ADAPTER].weight
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return network


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(IDS).logits


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_adapters_start_as_peft_starts_them_and_change_nothing_yet(folders: Path, name: str) -> None:
    network = load(folders / name)
    state = torch.get_rng_state()
    add_adapters(network, lora(), seed=3)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(3)
    theirs = get_peft_model(load(folders / name), PeftConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    peft = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    mine = dict(network.named_parameters())
    assert mine.keys() == peft.keys()
    assert all(p.equal(peft[n]) and p.requires_grad == peft[n].requires_grad for n, p in mine.items())
    assert {n.split(".")[-3] for n, p in mine.items() if p.requires_grad} == {"lora_A", "lora_B"}
    assert logits(network).equal(logits(load(folders / name)))


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_weights_with_their_adapters(folders: Path, name: str, tmp_path: Path) -> None:
    targets = ("c_attn", "c_proj") if name == "gpt2" else ("all-linear",)
    network = trained(folders / name, lora(target_modules=targets))
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    weights = weights_of(network)
    state = {w.name: w.value().clone() for w in weights}
    assert all(p.equal(before[n]) for n, p in network.named_parameters())
    # Names and shapes of the Hugging Face model, in its order; a plain model with these weights is the same network.
    plain = load(folders / name)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in state.items()}
    assert [w.name for w in weights] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(state, strict=False)
    plain.tie_weights()  # type: ignore[operator]
    torch.testing.assert_close(logits(plain), logits(network), rtol=1e-5, atol=1e-5)
    assert float((logits(network) - logits(load(folders / name))).abs().max()) > 1e-2
    # The saved adapter, merged by peft, gives these very weights.
    adapter = {n: p.data for w in weights for n, p in w.adapter.items()}
    save_adapter(tmp_path / "adapter", network, adapter, "base")
    merged = PeftModel.from_pretrained(load(folders / name), tmp_path / "adapter").merge_and_unload()
    assert [n for n, p in merged.named_parameters() if not p.equal(state[n])] == []


class Layers(nn.Sequential):
    """As much of a transformers model as adapters need."""

    def enable_input_require_grads(self) -> None: ...

    def get_output_embeddings(self) -> None: ...


def test_a_merged_bf16_weight_is_rounded_once() -> None:
    network = Layers(nn.Linear(64, 64, bias=False).bfloat16())
    add_adapters(network, lora(rank=1, alpha=1, target_modules=("0",)), seed=3)
    (weight,) = weights_of(network)
    (a, b) = weight.adapter.values()
    a.data.fill_(1.0)
    b.data.fill_(2.0**-9)
    weight.parameter.data.fill_(1.0 + 2.0**-7)
    # 1 + 2^-7 + 2^-9 lies a quarter of the spacing above a bf16 number.
    assert weight.value().dtype == torch.bfloat16 and weight.value().float().unique().tolist() == [1.0 + 2.0**-7]
    b.data.fill_(3 * 2.0**-9)
    assert weight.value().float().unique().tolist() == [1.0 + 2.0**-6]


def test_biases_and_a_network_without_adapters() -> None:
    network = Layers(nn.Linear(3, 3), nn.Linear(3, 3))
    assert [w.name for w in weights_of(network)] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    add_adapters(network, lora(target_modules=("1",)), seed=3)
    weights = weights_of(network)
    assert [w.name for w in weights] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [list(w.adapter) for w in weights] == [[], [], ["1.lora_A.weight", "1.lora_B.weight"], []]
    assert [len(w.parts) for w in weights] == [1, 1, 3, 1]


def test_the_network_without_its_adapters_is_the_start(folders: Path) -> None:
    network = trained(folders / "tied", lora())
    grads = [p.requires_grad for p in network.parameters()]
    with_them = logits(network)
    with pytest.raises(KeyError), without_adapters(network):
        assert logits(network).equal(logits(load(folders / "tied")))
        assert [p.requires_grad for p in network.parameters()] == grads
        raise KeyError
    assert logits(network).equal(with_them)


@pytest.mark.parametrize(
    ("name", "targets", "says"),
    [
        ("tied", ("q_prj",), "--ds.lora.target_modules q_prj: .*not found"),
        ("tied", ("lm_head", "q_proj"), "lm_head q_proj: lm_head is the output layer"),
        ("untied", ("lm_head",), "lm_head: lm_head is the output layer"),
        ("untied", ("embed_tokens",), "model.embed_tokens is not a linear layer"),
        ("untied", ("input_layernorm",), "input_layernorm: .* is not supported"),
        ("untied", ("mlp",), "target_modules mlp: Target module LlamaMLP"),
    ],
)
def test_targets_that_cannot_have_adapters(folders: Path, name: str, targets: tuple[str, ...], says: str) -> None:
    with pytest.raises(LoraError, match=says):
        check_adapters(str(folders / name), lora(target_modules=targets))


def test_targets_that_can(folders: Path) -> None:
    check_adapters(str(folders / "tied"), lora(target_modules=("q_proj", "down_proj")))
    check_adapters(str(folders / "gpt2"), lora())


def test_layers_below_the_lowest_adapter_have_no_backward_pass(folders: Path) -> None:
    def needs_gradient(*targets: str) -> list[bool]:
        network = load(folders / "tied").train()
        add_adapters(network, lora(target_modules=targets), seed=0)
        found: list[bool] = []
        for layer in network.model.layers:  # type: ignore[union-attr]
            layer.register_forward_hook(lambda module, given, out: found.append(out.requires_grad))
        network(IDS).logits.sum().backward()
        assert all(p.grad is not None for n, p in network.named_parameters() if "lora_B" in n)
        return found

    assert needs_gradient("1.self_attn.q_proj", "1.mlp.down_proj") == [False, True]
    assert needs_gradient("q_proj") == [True, True]
