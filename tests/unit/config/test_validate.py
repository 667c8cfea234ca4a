"""Every contradiction fires, and each case is valid but for the one thing it is about."""

from __future__ import annotations

from typing import Any

import pytest

from real_openrlhf.algo.objectives import OBJECTIVES
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.convert import build_config
from real_openrlhf.config.flags import ConfigError
from real_openrlhf.config.presets import PRESETS
from real_openrlhf.config.schema import Config
from real_openrlhf.config.validate import validate

VALID: dict[str, Any] = {
    "actor.model_name_or_path": "model",
    "data.prompt_dataset": "train.jsonl",
    "eval.dataset": "test.jsonl",
    "ckpt.output_dir": "out",
}


def config_with(changes: dict[str, Any]) -> Config:
    return build_config({**VALID, **changes})


def test_a_valid_configuration_has_no_warnings() -> None:
    assert validate(config_with({}), device="cuda") == []
    assert validate(config_with({}), device="cpu") == []


# Four ranks, two engines of two workers.
COLOCATED: dict[str, Any] = {
    "train.colocate_all": True,
    "vllm.enable_sleep": True,
    "ds.enable_sleep": True,
    "actor.num_gpus_per_node": 4,
    "vllm.num_engines": 2,
    "vllm.tensor_parallel_size": 2,
}

CONTRADICTIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"actor.model_name_or_path": ""}, None, "--actor.model_name_or_path is required"),
    ({"data.prompt_dataset": ""}, None, "--data.prompt_dataset is required"),
    ({"ckpt.output_dir": ""}, None, "--ckpt.output_dir is required"),
    ({"rollout.batch_size": 2, "actor.num_gpus_per_node": 4}, None, "--rollout.batch_size 2 .* 4 policy ranks"),
    ({"rollout.batch_size": 6, "actor.num_nodes": 2, "actor.num_gpus_per_node": 2}, None, "multiple of the 4 policy"),
    ({"train.batch_size": 100}, None, "--train.batch_size 100 must divide 256 prompts x 16 rollouts = 4096"),
    ({"train.batch_size": 8192}, None, "--train.batch_size 8192 must divide"),
    ({"real.mini_batches": 3}, None, "--real.mini_batches 3 must divide"),
    ({"train.batch_size": 2, "actor.num_gpus_per_node": 4}, None, "the 2 rollouts of an update .* 4 policy ranks"),
    ({"rollout.n_samples_per_prompt": 1}, None, "n_samples_per_prompt must be at least 2"),
    ({"rollout.top_p": 0.9, "rollout.temperature": 0.7}, None, "top_p 0.9 needs --rollout.temperature 1, got 0.7"),
    ({"rollout.top_p": 0.9, "algo.advantage.is_correction_level": "token"}, None, "is_correction_level token"),
    ({"real.keep_groups": "all"}, None, "--real.refill needs dynamic sampling"),
    ({"real.max_refills": 0}, None, "--real.max_refills 0"),
    ({"actor.lr_warmup_ratio": 0.1}, None, "use constant_with_warmup"),
    ({"actor.gradient_checkpointing_reentrant": True}, None, "needs --actor.gradient_checkpointing_enable"),
    ({"ds.adam_offload": True, "ds.zero_stage": 0}, None, "--ds.adam_offload needs"),
    ({"logger.term_grad_norm_at": "parameters", "ds.zero_stage": 3}, None, "needs complete parameters on every rank"),
    (
        {
            "logger.term_grad_norm_at": "parameters",
            "actor.gradient_checkpointing_enable": True,
            "actor.gradient_checkpointing_reentrant": True,
        },
        None,
        "torch refuses",
    ),
    ({"ds.zpg": 2, "actor.num_gpus_per_node": 2}, None, "--ds.zpg 2 needs --ds.zero_stage 3, got 2"),
    ({"ds.zpg": 3, "actor.num_gpus_per_node": 2, "ds.zero_stage": 3}, None, "--ds.zpg 3 must divide the 2"),
    ({"ds.param_dtype": "fp32", "ds.attn_implementation": "flash_attention_2"}, None, "cannot run in .* fp32"),
    ({"data.max_len": 1024}, None, "--data.max_len 1024 .* --rollout.max_new_tokens 1024"),
    ({"train.max_tokens_per_gpu": 3071}, None, "--train.max_tokens_per_gpu 3071 .* --data.max_len 3072"),
    ({"data.enable_thinking": False}, None, "add --data.apply_chat_template"),
    ({"eval.dataset": None, "eval.engine": "own"}, None, "--eval.engine own"),
    ({"vllm.tensor_parallel_size": 2}, "cpu", "--vllm.tensor_parallel_size 2 needs GPUs"),
    ({"vllm.tensor_parallel_size": 2, "real.device": "cpu"}, None, "needs GPUs"),
    ({"ds.use_liger_kernel": True}, "cpu", "--ds.use_liger_kernel needs GPUs"),
    ({"ds.attn_implementation": "flash_attention_2"}, "cpu", "needs GPUs; use sdpa"),
    ({"ds.lora.alpha": 32}, None, "--ds.lora.* needs --ds.lora.rank above 0"),
    ({"ds.lora.rank": 8, "ds.lora.target_modules": ("all-linear", "q_proj")}, None, "all-linear means all"),
    ({"algo.kl.init_coef": 0.1, "ref.num_gpus_per_node": 3}, None, "--rollout.batch_size 256 .* 3 reference ranks"),
    ({"algo.kl.init_coef": 0.1, "ref.offload": True}, None, "--ref.offload needs --ds.zero_stage 3, got 2"),
    ({"train.async_enable": True, "real.ratio": "none"}, None, "--real.ratio none leaves that uncorrected"),
    ({"vllm.enable_sleep": True}, None, "--vllm.enable_sleep .* add --train.colocate_all"),
    ({"ds.enable_sleep": True}, None, "--ds.enable_sleep .* add --train.colocate_all"),
    ({"train.colocate_all": True, "train.async_enable": True}, None, "take turns on the same GPUs"),
    ({"train.colocate_all": True, "sync.backend": "nccl"}, None, "--sync.backend nccl: .* two processes on one GPU"),
    ({"sync.backend": "nccl"}, "cpu", "--sync.backend nccl needs GPUs; on a CPU use auto"),
    ({"sync.backend": "ipc"}, None, "--sync.backend ipc .* must share; use auto, or add --train.colocate_all"),
    ({"train.colocate_all": True, "vllm.num_engines": 2}, None, "2 workers and .* = 1 ranks"),
    ({**COLOCATED, "vllm.gpu_memory_utilization": 0.8}, None, "0.8 leaves the policy .* use at most 0.75$"),
    (
        {"train.colocate_all": True, "vllm.enable_sleep": True, "vllm.gpu_memory_utilization": 0.6},
        None,
        "use at most 0.5, or take turns: --vllm.enable_sleep and --ds.enable_sleep",
    ),
    ({"vllm.max_num_seqs": 9, "vllm.max_num_batched_tokens": 8}, None, "8 must be at least --vllm.max_num_seqs 9"),
    ({"vllm.max_num_batched_tokens": 3071}, "cpu", "3071 must be at least --data.max_len 3072 on a CPU"),
    ({**COLOCATED, "ds.zero_stage": 0}, None, "--ds.enable_sleep moves ZeRO's optimizer states"),
    (COLOCATED, "cpu", "--train.colocate_all needs GPUs: .* vLLM has no sleep mode"),
]


@pytest.mark.parametrize(("changes", "device", "message"), CONTRADICTIONS, ids=[c[2][:50] for c in CONTRADICTIONS])
def test_contradictions(changes: dict[str, Any], device: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config_with(changes), device=device)


@pytest.mark.parametrize(
    "changes",
    [
        {"ckpt.output_dir": "", "dry_run": True},
        {"rollout.batch_size": 8, "actor.num_nodes": 2, "actor.num_gpus_per_node": 4},
        {"real.keep_groups": "all", "real.refill": False},
        {"actor.lr_scheduler": "constant_with_warmup", "actor.lr_warmup_ratio": 0.1},
        {"train.micro_batch_size": 3},  # micro-batches need not be equal
        {"train.max_tokens_per_gpu": 3072},
        {"vllm.tensor_parallel_size": 2},  # unknown device: left to the caller who knows it
        {"rollout.temperature": 0.7},
        {"ds.lora.rank": 8, "ds.lora.alpha": 32, "ds.lora.target_modules": ("q_proj", "v_proj")},
        {"algo.kl.init_coef": 0.1, "ref.num_nodes": 2, "ref.offload": True, "ds.zero_stage": 3},
        {"ref.num_gpus_per_node": 3},  # no KL, no reference
        {"algo.kl.init_coef": 0.1, "ds.lora.rank": 8, "ref.num_gpus_per_node": 3},  # nor a group with LoRA
        {"train.batch_size": 1024, "real.mini_batches": 3},  # the batch size has the word
        COLOCATED,
        {**COLOCATED, "vllm.gpu_memory_utilization": 0.75},
        {"train.colocate_all": True, "vllm.gpu_memory_utilization": 0.5},
        {"vllm.max_num_seqs": 8, "vllm.max_num_batched_tokens": 8},
        {"vllm.gpu_memory_utilization": 0.95},  # alone on its GPU
        {"train.async_enable": True},
        {"train.async_enable": True, "real.ratio": "none", "algo.advantage.is_correction_level": "token"},
    ],
)
def test_neighbours_of_contradictions_are_valid(changes: dict[str, Any]) -> None:
    assert validate(config_with(changes)) == []


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"eval.dataset": None}, None, "there is no evaluation"),
        ({"rollout.top_p": 0.9}, None, "log-probs are over the full vocabulary"),
        ({"real.ratio": "none", "real.mini_batches": 2}, None, "without an off-policy correction"),
        ({"real.mini_batches": 2, "algo.advantage.is_correction_level": "token"}, None, "has no effect"),
        ({"actor.adam.lr": 0.0}, None, "nothing is learned"),
        ({"train.async_enable": True, "train.full_determinism_enable": True}, None, "not bitwise"),
        ({"data.input_template": "{}\\n"}, None, "backslash"),
        ({"ds.param_dtype": "bf16"}, "cpu", "about 10 times slower"),
        ({"ds.param_dtype": "fp32"}, "cuda", "fp32 on GPUs"),
        # 0.05 per token: 0.05 * sqrt(1024) = 1.6, and 0.5 at 100 tokens.
        ({"algo.advantage.is_correction_level": "token"}, "cuda", "by about 1.6, so it is mostly noise"),
        (
            {"algo.advantage.is_correction_level": "token", "rollout.max_new_tokens": 100},
            "cuda",
            "over up to 100 tokens. Rounding alone changes its logarithm by about 0.5",
        ),
        ({"ds.adam_offload": True}, "cpu", "compiles its CPU Adam"),
        ({"ds.lora.rank": 8, "ds.lora.dropout": 0.1}, None, "not quite on-policy"),
        (
            {"algo.kl.init_coef": 0.1, "ref.offload": True, "ds.zero_stage": 3},
            "cpu",
            "the reference is in CPU memory anyway",
        ),
    ],
)
def test_warnings(changes: dict[str, Any], device: Any, message: str) -> None:
    warnings = validate(config_with(changes), device=device)
    assert len(warnings) == 1 and message in warnings[0]


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"ds.param_dtype": "auto"}, "cpu"),  # fp32
        ({"rollout.max_new_tokens": 99}, "cuda"),
        ({"real.beta": 0.0}, "cuda"),  # no Term 2
        ({"vllm.max_num_batched_tokens": 3071, "real.beta": 0.0}, "cuda"),  # prompts are cut into chunks
    ],
)
def test_what_is_right_on_this_device_is_not_warned_of(changes: dict[str, Any], device: Any) -> None:
    assert validate(config_with({"algo.advantage.is_correction_level": "token", **changes}), device=device) == []


def test_the_scale_error_names_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"--real\.scale .*does not ascend"):
        parse_args(["--real.scale", "5-1"])


def test_the_reference_preset_warns_of_its_known_biases() -> None:
    argv = [text for name, value in VALID.items() for text in (f"--{name}", value)]
    warnings = validate(parse_args([*argv, "--real.preset", "reference"]))
    assert len(warnings) == 2


def test_a_flag_that_the_objective_does_not_read_is_refused() -> None:
    for changes, name in (
        ({"real.objective": "standard_rl", "real.lam": 2.0}, "real.lam"),
        ({"real.objective": "term1_only", "real.beta": 0.5}, "real.beta"),
        ({"real.objective": "jepo", "real.invalid_penalty": 1.0}, "real.invalid_penalty"),
        ({"real.objective": "term2_only", "real.standardise": False}, "real.standardise"),
    ):
        with pytest.raises(ConfigError, match=f"--{name}: the objective {changes['real.objective']} does not read it"):
            validate(config_with(changes))
    # What a preset or a default says is nobody's wish.
    for objective in OBJECTIVES:
        for preset in PRESETS:
            validate(config_with({"real.objective": objective, **PRESETS[preset], "real.preset": preset}))
