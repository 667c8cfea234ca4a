"""The page's file for verl inside verl's own loss, advantages and agent loop, where verl is installed.

It is no requirement of the package: `pip install verl==0.9.1` in an environment of its own, since it wants another
transformers than OpenRLHF.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tiny_judge import ANCHOR, make_rows

pytest.importorskip("verl", reason="verl is not installed")
pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "real_openrlhf/dropin/README.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"^```python\n(# real_verl\.py\n.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
(COMMAND,) = re.findall(
    r"^VERL_USE_EXTERNAL_MODULES=real_verl python -m verl\.trainer\.main_ppo (.*?)^```", PAGE, re.M | re.S
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file of the page, as a module, for the tiny judge's anchor."""
    folder = tmp_path_factory.mktemp("verl")
    (folder / "real_verl.py").write_text(CODE.replace('"So the overall score is "', repr(ANCHOR)))
    sys.path.insert(0, str(folder))
    try:
        import real_verl  # type: ignore[import-not-found]

        yield real_verl
    finally:
        sys.path.remove(str(folder))


def nested(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_the_loss_is_term_1_in_verls_own_ppo_loss(page: Any, dp_size: int) -> None:
    """A batch of 4 rollouts, 3 of them here: minus A times the ratio, summed over the feedback, over 4."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=2,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode="real"),
    )
    # Prompts of two tokens, responses of 4, 3 and 2; the mask ends before the score.
    masks = [[1, 1, 1, 0], [1, 0, 0], [1, 1]]
    new = [[-0.5, -1.0, -0.2, -3.0], [-0.7, -9.0, -8.0], [-0.1, -2.0]]
    old = [[-0.4, -1.0, -0.3, -1.0], [-0.7, -1.0, -1.0], [-1.1, -2.0]]
    advantages = [1.0, -0.5, 0.25]
    # Log-probs of all tokens but the first, shifted by one; those of the prompt play no part.
    flat = torch.tensor([x for row in new for x in (-5.0, *row, -5.0)], requires_grad=True)
    data = tu.get_tensordict(
        {
            "prompts": nested([[1, 2]] * 3, torch.int64),
            "responses": nested([[3.0] * len(row) for row in new], torch.int64),
            "response_mask": nested(masks),
            "old_log_probs": nested(old),
            "advantages": nested([[a * m for m in mask] for a, mask in zip(advantages, masks)]),
        },
        {"dp_size": dp_size, "batch_num_tokens": 7, "global_batch_size": 4},
    )
    loss, metrics = ppo_loss(config, {"log_probs": nested_like(flat, [6, 5, 4])}, data)
    loss.backward()
    wanted = 0.0
    for a, mask, now, before in zip(advantages, masks, new, old):
        for used, x, y in zip(mask, now, before):
            ratio = math.exp(x - y)
            wanted -= used * min(a * ratio, a * min(1.2, max(0.8, ratio))) / 4 * dp_size
    assert loss.item() == pytest.approx(wanted, abs=1e-6)
    assert metrics["actor/pg_clipfrac"].aggregate() == pytest.approx(1 / 6)  # exp(1.0) of the third rollout
    gradient = flat.grad
    assert gradient is not None
    assert gradient[1].item() == pytest.approx(-math.exp(-0.1) / 4 * dp_size)
    assert gradient[[0, 4, 5, 6, 8, 9, 10, 11, 14]].tolist() == [0.0] * 9


def nested_like(flat: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(flat, offsets)


def test_the_advantages_are_the_papers_in_verls_own_computation(page: Any) -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rewards = [-1.0, -2.0, -6.0, -4.0, 0.0, -4.0]  # prompts a, b, a, b, a, b
    mask = torch.tensor([[1, 1, 0]] * 5 + [[1, 0, 0]])
    token_level = torch.zeros(6, 3)
    token_level[:, -1] = torch.tensor(rewards)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": token_level, "response_mask": mask},
        non_tensors={"uid": np.array(list("ababab"), dtype=object)},
    )
    got = compute_advantage(data, "real").batch["advantages"]
    wanted = []
    for i, prompt in enumerate("ababab"):
        group = [r for r, p in zip(rewards, "ababab") if p == prompt]
        leave_one_out = [r - (sum(group) - r) / 2 for r in group]
        spread = math.sqrt(sum(a * a for a in leave_one_out) / 3)  # they add up to 0
        wanted.append(min(1.0, max(-1.0, (rewards[i] - (sum(group) - rewards[i]) / 2) / spread)))
    assert got[:, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(got, got[:, :1] * mask)


class Server:
    """What verl's server makes of a request (`vllm_async_server.generate`), on vLLM's engine in this process."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: Any, **more: Any) -> Any:
        from vllm import SamplingParams

        asked = dict(sampling_params)
        asked["logprobs"] = 0 if asked.pop("logprobs", False) else None
        stream = self.engine.generate({"prompt_token_ids": prompt_ids}, SamplingParams(**asked), request_id)
        final = [part async for part in stream][-1]
        answer = final.outputs[0]
        log_probs = [table[token].logprob for token, table in zip(answer.token_ids, answer.logprobs or [])]
        return SimpleNamespace(
            token_ids=list(answer.token_ids),
            log_probs=log_probs,
            num_preempted=0,
            routed_experts=None,
            extra_fields={},
        )


class PlainServer:
    """The same of transformers' logits: log-probs are those of the whole vocabulary, whatever may be sampled."""

    def __init__(self, model: Any, end: int) -> None:
        self.model, self.end = model, end

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: Any, **more: Any) -> Any:
        allowed = sampling_params.get("allowed_token_ids")
        ids, log_probs = list(prompt_ids), []
        while len(log_probs) < sampling_params["max_tokens"] and ids[-1] != self.end:
            with torch.no_grad():
                logprobs = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
            ids.append(allowed[0] if allowed else int(torch.multinomial(logprobs.exp(), 1)))
            log_probs.append(float(logprobs[ids[-1]]))
        token_ids = ids[len(prompt_ids) :]
        return SimpleNamespace(
            token_ids=token_ids, log_probs=log_probs, num_preempted=0, routed_experts=None, extra_fields={}
        )


@pytest.mark.parametrize("server", ["transformers", "vllm"])
def test_the_agent_loops_reward_is_that_of_the_models_own_logits(page: Any, judges: Path, server: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(judges / "tied") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = make_rows(8, seed=5)
    torch.manual_seed(0)
    plain = PlainServer(model, tokenizer.eos_token_id) if server == "transformers" else None
    readable = 0
    for row, output in zip(rows, asyncio.run(outputs_of(page, judges, tokenizer, rows, plain))):
        ids, mask, label = output.prompt_ids + output.response_ids, output.response_mask, int(str(row["label"]))
        words = tokenizer.convert_ids_to_tokens(output.response_ids)
        if "score" not in words[:-1]:
            assert all(mask) and output.reward_score == pytest.approx(-(max(label, 5 - label) ** 2) + math.log(1e-6))
            continue
        readable += 1
        position = max(i for i, word in enumerate(words[:-1]) if word == "score") + 1
        assert mask == [1] * position + [0] * (len(words) - position)
        with torch.no_grad():
            logprobs = (
                model(torch.tensor([ids])).logits[0, len(output.prompt_ids) + position - 1].double().log_softmax(0)
            )
        p = {v: math.exp(float(logprobs[tokenizer.convert_tokens_to_ids(str(v))])) for v in range(1, 6)}
        expected = sum(v * q for v, q in p.items())
        assert output.reward_score == pytest.approx(-((expected - label) ** 2) + math.log(p[label]), abs=1e-3)
    assert readable >= 4


async def outputs_of(
    page: Any, judges: Path, tokenizer: Any, rows: list[dict[str, Any]], server: Any = None
) -> list[Any]:
    """server: None for one on vLLM's engine."""
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap

    engine = engine_of(judges) if server is None else None
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"prompt_length": 20, "response_length": 12}}})
    loop = page.RealAgentLoop(
        DictConfigWrap(config),
        server or Server(engine),
        tokenizer,
        None,
        SimpleNamespace,
        DictConfigWrap(OmegaConf.create({})),
    )
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12, "logprobs": True}
    try:
        return [
            await loop.run(
                sampling,
                raw_prompt=[{"role": "user", "content": row["prompt"]}],
                reward_model={"ground_truth": str(row["label"])},
            )
            for row in rows
        ]
    finally:
        if engine is not None:
            engine.shutdown()


def engine_of(judges: Path) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from real_openrlhf.common.device import Device

    device = Device.resolve("cpu", "fp32")
    os.environ.update(device.engine_env(1))
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(judges / "tied"),
            dtype="float32",
            seed=1,
            max_model_len=40,
            enforce_eager=True,
            logprobs_mode="raw_logprobs",
            **device.engine_options(40),
        )
    )


CHECK = """
import sys
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", overrides=sys.argv[1:])
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
actor = config.actor_rollout_ref
print(get_adv_estimator_fn(config.algorithm.adv_estimator).__module__)
print(get_policy_loss_fn(actor.actor.policy_loss.loss_mode).__module__)
print(_agent_loop_registry[actor.rollout.agent.default_agent_loop]["_target_"])
print(actor.rollout.logprobs_mode)
"""


def test_the_pages_command_finds_the_pages_file(tmp_path: Path) -> None:
    """As far as a machine without a GPU goes: verl's configuration takes the words, its registries have the names."""
    (tmp_path / "real_verl.py").write_text(CODE)
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "real_verl", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = COMMAND.replace("\\\n", " ").split()
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-4:] == ["real_verl", "real_verl", "real_verl.RealAgentLoop", "raw_logprobs"]
