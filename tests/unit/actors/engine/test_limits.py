"""What a configuration says of an engine, held against vLLM's rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from real_openrlhf.actors.engine.limits import ModelLimits
from real_openrlhf.actors.engine.spec import EngineSpecError

SIZES = dict(vocab_size=100, hidden_size=96, num_hidden_layers=1, intermediate_size=64, num_attention_heads=6)


def limits(folder: Path, model_type: str = "llama", **more: object) -> ModelLimits:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **more}))
    return ModelLimits.of(str(folder))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 8192),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                },
            },
            131072,
        ),
        ({"model_type": "gpt2", "n_positions": 1024, "n_head": 6, "n_embd": 66}, 1024),
    ],
)
def test_positions(config: dict[str, object], positions: int, tmp_path: Path) -> None:
    found = limits(tmp_path, **config)  # type: ignore[arg-type]
    assert found.positions == positions and found.heads == 6 and found.vocabulary == 100
    found.check_length(positions, "--data.max_len")
    with pytest.raises(EngineSpecError, match=rf"--data.max_len {positions + 1} is more than the model's {positions} "):
        found.check_length(positions + 1, "--data.max_len")


def test_vllms_own_leave_to_go_beyond_the_positions_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    limits(tmp_path, max_position_embeddings=64).check_length(65, "--data.max_len")


def test_a_configuration_that_does_not_say_limits_nothing() -> None:
    unknown = ModelLimits(positions=None, heads=None, vocabulary=None)
    unknown.check_length(10**9, "--data.max_len")
    unknown.check_workers(7, "--vllm.tensor_parallel_size")
    unknown.check_tokens([10**9], "the prompts")


def test_workers_share_the_heads_evenly(tmp_path: Path) -> None:
    found = limits(tmp_path)
    for fits in (1, 2, 3, 6):
        found.check_workers(fits, "--vllm.tensor_parallel_size")
    with pytest.raises(EngineSpecError, match=r"size 4 must divide the model's 6 attention heads; use 1, 2, 3$"):
        found.check_workers(4, "--vllm.tensor_parallel_size")


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    found = limits(tmp_path)
    found.check_tokens([0, 99], "the prompts")
    with pytest.raises(EngineSpecError, match="the prompts hold the token 100, but the model's vocabulary ends at 99"):
        found.check_tokens([3, 100], "the prompts")


def test_a_model_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(EngineSpecError, match=r"the configuration of .* does not load"):
        ModelLimits.of(str(tmp_path))
