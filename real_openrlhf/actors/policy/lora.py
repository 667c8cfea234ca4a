"""LoRA in the policy: adds adapters, computes merged weights, and switches adapters off.

peft's layers are injected into the network, whose Hugging Face class stays the same. Adapters are never merged in
place: a merged weight is computed when it is sent or saved, then dropped, so that the network in training cannot
drift. Engines and the exported folder get plain weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from real_openrlhf.algo.dtypes import upcast
from real_openrlhf.config.schema import LoraConfig

# peft's name of the one adapter of every layer.
ADAPTER = "default"


class LoraError(ValueError):
    """This model cannot have these adapters."""


def add_adapters(network: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Freeze the network and add an adapter to each linear layer that the targets name, as OpenRLHF does.

    The start depends on the seed alone, and is the same on all ranks. Raises LoraError for targets that the
    network does not have, that are not linear layers, and for the output layer.
    """
    every = lora.target_modules == ("all-linear",)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if every else list(lora.target_modules),
        lora_dropout=lora.dropout,
        bias="none",
    )
    shown = " ".join(lora.target_modules)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of a tied head, which is refused below
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, network, adapter_name=ADAPTER)  # type: ignore[arg-type]
    except ValueError as error:
        # Only the first line: peft's message holds the whole module.
        raise LoraError(f"--ds.lora.target_modules {shown}: {str(error).splitlines()[0]}") from error
    head = network.get_output_embeddings()  # type: ignore[operator]
    for name, layer in lora_layers(network).items():
        if layer is head:
            raise LoraError(
                f"--ds.lora.target_modules {shown}: {name} is the output layer, which is computed in chunks from its "
                "own weight (and may share it with the embedding); leave it out, or use all-linear"
            )
        if type(layer) is not Linear:
            raise LoraError(f"--ds.lora.target_modules {shown}: {name} is not a linear layer")


def check_adapters(path: str, lora: LoraConfig) -> None:
    """LoraError for a model that cannot take these adapters. Reads its config only, no weights."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path, trust_remote_code=False), trust_remote_code=False
        )
    add_adapters(network, lora, seed=0)


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Layers with an adapter (peft's Linear) by their names in the Hugging Face model; empty without LoRA."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter under its name in the Hugging Face checkpoint, and its adapter, if it has one."""

    name: str
    parameter: nn.Parameter
    layer: Any = None

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameters that `value` is computed from; under ZeRO-3 they must be gathered first."""
        return [self.parameter, *self.adapter.values()]

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in peft's files: A [r, in] and B [out, r]. Empty without one."""
        if self.layer is None:
            return {}
        start = self.name.removesuffix(".weight")
        return {
            f"{start}.lora_A.weight": self.layer.lora_A[ADAPTER].weight,
            f"{start}.lora_B.weight": self.layer.lora_B[ADAPTER].weight,
        }

    @torch.no_grad()
    def value(self) -> Tensor:
        """The whole weight, W + alpha / rank * B A, added in fp32 and rounded once to W's dtype."""
        if self.layer is None:
            return self.parameter.data
        delta = self.layer.get_delta_weight(ADAPTER)
        return (upcast(self.parameter.data) + upcast(delta)).to(self.parameter.dtype)


def weights_of(network: nn.Module) -> list[Weight]:
    """All parameters of the Hugging Face model, in its order; a tied head appears once, as the embedding."""
    layers = lora_layers(network)
    adapters = {id(p) for layer in layers.values() for p in _adapter_parameters(layer)}
    weights = []
    for name, parameter in network.named_parameters():
        if id(parameter) in adapters:
            continue
        owner, _, kind = name.rpartition(".")
        layer = layers.get(owner.removesuffix(".base_layer")) if owner.endswith(".base_layer") else None
        if layer is None:
            weights.append(Weight(name=name, parameter=parameter))
        else:
            name = f"{owner.removesuffix('.base_layer')}.{kind}"
            weights.append(Weight(name=name, parameter=parameter, layer=layer if kind == "weight" else None))
    return weights


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """The network as it was before LoRA: the reference policy.

    It sets the adapters' scale to 0. peft's own switch also changes requires_grad, on which DeepSpeed's hooks rely.
    """
    layers = lora_layers(network).values()
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def save_adapter(folder: str | Path, network: Any, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write a folder that peft's PeftModel.from_pretrained can load onto the base model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = network.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapter_parameters(layer: Any) -> Iterator[nn.Parameter]:
    for name in layer.adapter_layer_names:
        yield from getattr(layer, name).parameters()
