"""The least memory that a run needs on each GPU. Activations, logits, KV cache and buffers need more on top of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from real_openrlhf.common.cards import Card
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.schema import Config
from real_openrlhf.run.ray_session import cluster_to_join


def policy_bytes(config: Config, parameters: int, weight_bytes: int) -> int:
    """Bytes of weights, gradients and Adam's states on one rank. weight_bytes: per weight, 2 in bf16, 4 in fp32.

    Adam's states take 12 bytes per parameter in mixed precision (fp32 master weight, two moments) and 8 in fp32 (two
    moments). Adapters, and what DeepSpeed keeps in CPU memory, are not counted.
    """
    ds, ranks = config.ds, config.ranks
    weights = parameters * weight_bytes // (ranks if ds.zero_stage == 3 else 1)
    if ds.lora.rank or ds.adam_offload:
        return weights
    gradients = parameters * weight_bytes // (ranks if ds.zero_stage >= 2 else 1)
    states = parameters * (12 if weight_bytes == 2 else 8) // (ranks if ds.zero_stage >= 1 else 1)
    return weights + gradients + states


def memory_problem(config: Config, parameters: int, weight_bytes: int, card_bytes: int) -> str | None:
    """Why the plan cannot fit into GPUs of card_bytes each, and which flags would help; None: it may fit."""
    vllm, share = config.vllm, config.engine_utilisation
    policy, engine = policy_bytes(config, parameters, weight_bytes), parameters * weight_bytes
    engine //= vllm.tensor_parallel_size
    of = f"of {parameters / 1e9:.1f} billion parameters"
    if engine > share * card_bytes:
        return (
            f"an engine has {_gb(engine)} of weights {of} on each of its {vllm.tensor_parallel_size} GPU(s), and may "
            f"take {_gb(share * card_bytes)} (--vllm.gpu_memory_utilization {share:g} of {_gb(card_bytes)}); raise "
            "--vllm.tensor_parallel_size"
        )
    turns = vllm.enable_sleep and config.ds.enable_sleep
    shared = share * card_bytes if config.train.colocate_all and not turns else 0.0
    if policy + shared <= card_bytes:
        return None
    also = f", next to the engines' {_gb(shared)}" if shared else ""
    ways = [] if config.ds.zero_stage == 3 else ["--ds.zero_stage 3"]
    ways += [] if not shared else ["--vllm.enable_sleep with --ds.enable_sleep"]
    ways += ["more ranks (--actor.num_nodes, --actor.num_gpus_per_node)"]
    if not (config.ds.adam_offload or config.ds.lora.rank):
        ways += ["--ds.adam_offload", "--ds.lora.rank"]
    return (
        f"the policy {of} needs at least {_gb(policy)} on each of {config.ranks} GPU(s) for weights, gradients and "
        f"optimizer{also}, without activations, and the largest GPU here has {_gb(card_bytes)}; use "
        + ", or ".join(ways)
    )


def check_memory(config: Config, cards: Sequence[Card], *, assumed: bool = False) -> list[str]:
    """ConfigError for a model that cannot fit into `cards`; only a warning on a cluster, which may have other GPUs.

    Without GPUs on this machine, as on a head node, nothing is checked. assumed: the cards are --assume_gpus'.
    """
    if config.real.device == "cpu" or not cards or (torch.version.cuda is None and not assumed):
        return []
    parameters = count_parameters(config.actor.model_name_or_path)
    if parameters is None:
        return []
    weight_bytes = 4 if config.ds.param_dtype == "fp32" else 2
    problem = memory_problem(config, parameters, weight_bytes, max(card.memory for card in cards))
    if problem is None:
        return []
    if cluster_to_join(config.ray.address) and not assumed:
        return [f"if the cluster's GPUs are like this machine's: {problem}"]
    raise ConfigError(problem)


def count_parameters(path: str) -> int | None:
    """Number of parameters by the model's config, a tied head counted once. None if the model cannot be built here."""
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError):
        return None  # the policy's own loading reports what is wrong
    return sum(p.numel() for p in network.parameters())


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
