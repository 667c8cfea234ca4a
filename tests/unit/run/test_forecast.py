"""Memory and time in the plan: for GPUs that are here, that are not, and for those of a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from real_openrlhf.common.cards import Card
from real_openrlhf.common.device import Device
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.run import forecast as module
from real_openrlhf.run.assumed_gpus import AssumedGpus
from real_openrlhf.run.forecast import forecast
from real_openrlhf.run.inputs import load_inputs
from real_openrlhf.run.plan import make_plan
from real_openrlhf.run.plan_text import render
from tests.helpers.configs import QWEN3_32B, write_config
from tests.helpers.run_inputs import inputs_of
from tests.helpers.tiny_judge import make_tokenizer, write_rows
from tests.unit.run.test_specs import config_of

CUDA = Device(name="cuda", dtype_name="bf16")
# The batch script's flags for two nodes of eight GPUs.
SLURM = [
    *("--actor.num_nodes", "2", "--actor.num_gpus_per_node", "8"),
    *("--vllm.num_engines", "8", "--vllm.tensor_parallel_size", "2"),
    *("--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep"),
    *("--ds.zero_stage", "3", "--actor.gradient_checkpointing_enable", "--train.max_tokens_per_gpu", "18432"),
]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of Qwen3-32B's configuration, a small tokenizer, and prompts of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("big")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    write_config(folder, "qwen3", **QWEN3_32B)
    rows: list[dict[str, object]] = [
        {"prompt": " ".join(["fine"] * 2047 + ["judge"]), "label": 1 + i % 5} for i in range(256)
    ]
    write_rows(folder / "train.jsonl", rows)
    flags = ["--actor.model_name_or_path", str(folder), "--data.prompt_dataset", str(folder / "train.jsonl")]
    return [*flags, "--real.anchor", "score ", "--dry_run"]


PHASES = ["forward", "output layer", "layers", "update", "sync", "generation"]


def table(text: str) -> dict[str, list[str]]:
    """Rows of the plan's text by their first words."""
    rows = [line.strip().split("  ") for line in text.splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_the_batch_scripts_layout_fits_qwen3_32b(big: list[str]) -> None:
    plan = make_plan(inputs_of(big, *SLURM, "--assume_gpus", "2x8x80GB"))
    assert plan.forecast is not None and plan.forecast.memory.fits and plan.forecast.warnings == ()
    text = render(plan)
    rows = table(text)
    assert rows["policy+rollout, 16 GPU(s)"] == PHASES
    # 32.76e9 parameters over 16 ranks: 2, 4 and 12 bytes of each; an engine has half of the weights.
    assert rows["weights*"] == ["4.1"] * 6 and rows["gradients*"] == ["8.2"] * 4 and rows["optimizer*"] == ["24.6"] * 4
    assert rows["engine weights*"] == ["32.8"] * 2
    # 65 inputs of layers: 18,432 tokens x 5,120 x 2 bytes.
    assert rows["activations"] == [f"{65 * 18_432 * 5120 * 2 / 1e9:.1f}"] * 3
    assert all(float(cell) < 80 for cell in rows["in all"]) and "!" not in text
    # 16 bytes of every parameter, of eight ranks of sixteen.
    assert "sleeping optimizer 262.1 GB" in text
    assert "by the rates of H100, since none are known of GPUs without a name" in text
    assert [name for name in ("generation", "policy", "optimizer", "sync") if name not in rows] == []


def test_the_same_on_half_of_the_gpus_does_not_fit(big: list[str]) -> None:
    half = ["--actor.num_nodes", "1", "--vllm.num_engines", "4"]
    plan = make_plan(inputs_of(big, *SLURM, *half, "--assume_gpus", "8xA100-80GB"))
    (warning,) = [w for w in plan.warnings if "run out of memory" in w]
    assert (
        "by an estimate: policy+rollout of 32.8 billion" in warning
        and "it fits with --ds.adam_offload (CPU memory of a policy node: 703.2 GB)" in warning
    )
    text = render(plan)
    assert "!" in text and "by the rates of A100; responses" in text


def test_what_cannot_fit_is_refused(big: list[str]) -> None:
    small = ["--actor.num_nodes", "1", "--actor.num_gpus_per_node", "4", "--vllm.num_engines", "2"]
    with pytest.raises(ConfigError, match=r"at least .* on each of 4 GPU\(s\)") as error:
        make_plan(inputs_of(big, *SLURM, *small, "--assume_gpus", "4x80GB"))
    # An engine takes its share beside a quarter of the weights.
    assert "it fits with --vllm.gpu_memory_utilization 0.7 --ds.adam_offload (CPU" in str(error.value)
    with pytest.raises(ConfigError, match="no few flags make it fit on as many GPUs"):
        make_plan(inputs_of(big, *SLURM, *small, "--assume_gpus", "4x12GB"))


def test_assumed_gpus_by_their_names() -> None:
    parsed = AssumedGpus.parse("2x8xa100-80GB")
    assert (parsed.nodes, parsed.gpus_per_node, parsed.memory, parsed.name) == (2, 8, 80 * 10**9, "A100")
    assert str(parsed) == "2 node(s) x 8 GPU(s) of 80 GB (A100)"
    assert AssumedGpus.parse("8xH100 PCIe-80GB").name == "H100 PCIe" and AssumedGpus.parse("8x80GB").name is None
    with pytest.raises(ConfigError, match="no rates are known of A1000; known are B200, "):
        AssumedGpus.parse("8xA1000-80GB")


# -- memory of the GPUs here --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(folder)
    return str(folder)


def card_of(memory: int) -> Card:
    return Card(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=memory, driver="580")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    found: list[Card] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(module, "local_cards", lambda: tuple(found))
    return found


def test_gpus_that_are_here(small: str, cards: list[Card]) -> None:
    config = config_of("--actor.model_name_or_path", small)
    assert forecast(config, CUDA, [9], None) is None  # a head node
    # The largest card counts.
    cards += [card_of(10**6), card_of(80 * 10**9)]
    found = forecast(config, CUDA, [9, 5], None)
    assert found is not None and found.memory.fits and found.time is not None
    assert found.time.card == "NVIDIA H100 80GB HBM3"
    assert forecast(config, Device(name="cpu", dtype_name="fp32"), [9], None) is None
    assert forecast(config_of("--actor.model_name_or_path", "/no/such"), CUDA, [9], None) is None


def test_a_model_that_cannot_fit_is_refused(small: str, cards: list[Card]) -> None:
    config = config_of("--actor.model_name_or_path", small, "--vllm.gpu_memory_utilization", "0.9")
    cards.append(card_of(1000))
    with pytest.raises(ConfigError, match=r"an engine has .* of weights"):
        forecast(config, CUDA, [9], None)
    # A little more, and it is the estimates alone that say so.
    cards[0] = card_of(2 * 10**9)
    found = forecast(config, CUDA, [9], None)
    assert found is not None and "may run out of memory, by an estimate" in found.warnings[0]


def test_more_cpu_memory_than_there_is(small: str, cards: list[Card], monkeypatch: pytest.MonkeyPatch) -> None:
    cards.append(card_of(80 * 10**9))
    config = config_of("--actor.model_name_or_path", small, "--actor.num_gpus_per_node", "2", "--ds.adam_offload")

    def warnings(there: int) -> tuple[str, ...]:
        monkeypatch.setattr(module, "_cpu_memory", lambda: there)
        found = forecast(config, CUDA, [9], None)
        assert found is not None
        return found.warnings

    assert warnings(7 * 10**9) == ()
    (warning,) = warnings(5 * 10**9)
    assert (
        "a policy node needs about 6.0 GB of CPU memory (optimizer 0.0 GB, 2 processes 6.0 GB), this machine has 5.0"
        in warning
    )


def test_the_cluster_may_have_other_gpus(small: str, cards: list[Card]) -> None:
    config = config_of("--actor.model_name_or_path", small)
    cards.append(card_of(1000))
    found = forecast(replace(config, ray=replace(config.ray, address="10.0.0.1:1")), CUDA, [9], None)
    assert found is not None
    assert found.warnings[0].startswith("if the cluster's GPUs are like this machine's: an engine has")


def test_layers_of_another_kind(tmp_path: Path, cards: list[Card]) -> None:
    from transformers import GPT2Config

    from real_openrlhf.run.memory_text import memory_lines

    GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    cards.append(card_of(80 * 10**9))
    found = forecast(config_of("--actor.model_name_or_path", str(tmp_path)), CUDA, [9], None)
    assert found is not None and found.time is None
    text = "\n".join(memory_lines(found.memory))
    assert "nothing is said of activations, KV cache and time" in text and "KV cache of an engine" not in text


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ((), ["policy", "rollout"]),
        (("--algo.kl.init_coef", "0.1"), ["policy", "rollout", "reference"]),
        (("--eval.dataset", "e", "--eval.engine", "own"), ["policy", "rollout", "evaluator"]),
    ],
)
def test_every_kind_of_actor_has_its_gpus(
    more: tuple[str, ...], names: list[str], small: str, cards: list[Card]
) -> None:
    cards.append(card_of(80 * 10**9))
    found = forecast(config_of("--actor.model_name_or_path", small, *more), CUDA, [9], None)
    assert found is not None and [place.name for place in found.memory.places] == names


def test_liger_is_looked_for_where_the_run_is(small: str, cards: list[Card], monkeypatch: pytest.MonkeyPatch) -> None:
    cards.append(card_of(80 * 10**9))

    def kept(*more: str) -> Any:
        found = forecast(config_of("--actor.model_name_or_path", small, *more), CUDA, [9], None)
        assert found is not None
        terms = found.memory.places[0].phases[0].terms
        return next(term.bytes for term in terms if term.name == "activations")

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    plain = kept()
    assert kept("--ds.use_liger_kernel") < plain
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    assert kept() < plain and kept("--no-ds.use_liger_kernel") == plain


def test_a_warm_up_without_evaluation_has_no_engines(big: list[str]) -> None:
    layout = [*("--actor.num_nodes", "2", "--actor.num_gpus_per_node", "8", "--ds.zero_stage", "3")]
    layout += ["--actor.gradient_checkpointing_enable", "--train.max_tokens_per_gpu", "4096"]
    rows = big[big.index("--data.prompt_dataset") + 1]
    flags = [*big, *layout, "--train.batch_size", "32", "--warmup.feedback", "missing", "--assume_gpus", "2x8x80GB"]
    plan = make_plan(load_inputs(parse_args([*flags, "--data.prompt_dataset", rows], warmup=True)))
    assert plan.forecast is not None and plan.forecast.time is None and plan.forecast.memory.fits
    (place,) = plan.forecast.memory.places
    assert (place.name, place.gpus) == ("policy", 16)
    text = render(plan)
    assert "KV cache" not in text and "policy, 16 GPU(s)" in text
    assert not any("sync" in phase.name or "generation" in phase.name for phase in place.phases)
