"""Stock OpenRLHF's RLOO step by its own classes, in one process and on any device.

It does what a step of `PPOTrainer` does once rollouts and rewards are there: `RemoteExperienceMaker.
make_experience_batch` (log-probs of the rollouts, then RLOO advantages), filling the policy actor's replay buffer, and
`PolicyModelActor.fit`, which is `ActorPPOTrainer.ppo_train`. The actor, its model, its loss and its trainer are
OpenRLHF's; `overrides_of` lists what is not.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.trainer.ppo_utils import experience_maker
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController
from openrlhf.trainer.ray import ppo_actor
from openrlhf.utils import utils as openrlhf_utils
from openrlhf.utils.deepspeed import DeepspeedStrategy

from examples.benchmark.contestants.common import (
    MAX_STEPS,
    Outcome,
    Setup,
    arguments,
    set_checkpointing,
    set_sizes,
    single_rank,
)
from examples.benchmark.protocol import Case
from examples.benchmark.rollouts import SCALE
from examples.benchmark.timers import Timers
from real_openrlhf.actors.policy.strategy import PolicyStrategy
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import Group, group_scores
from real_openrlhf.common.device import Device

# OpenRLHF wraps its class with @ray.remote; this is the plain class inside.
_PolicyModelActor = ppo_actor.PolicyModelActor.__ray_metadata__.modified_class.__ray_actor_class__
PAD_ID = 0


def overrides_of(device: Device) -> list[str]:
    """Everything that differs from OpenRLHF, and why."""
    always = [
        "DeepspeedStrategy.setup_distributed: this project's, which takes backend and mesh from the device",
        "DeepspeedStrategy.get_ds_train_config: this project's, without a fixed train_batch_size, which DeepSpeed is "
        "told for each case, and with torch's fused AdamW, as for all contestants, whose kernel needs no compilation; "
        "its grad_accum_dtype of fp32 is ignored by DeepSpeed's ZeRO 2, as OpenRLHF's own setting is",
        "--vllm.sync_backend gloo: with nccl the actor imports vLLM, which has no part in a step",
        "ray.put, ray.get and RayActorGroup around experiences: one process, so values are handed over as they are; "
        "the cost of moving them is left out",
        "get_tokenizer: token ids are synthetic, only an id for padding is asked for",
        "rewards: come with the rollouts, as from OpenRLHF's reward functions and agents",
        "vllm_engines: none, generation and weight sync are measured elsewhere",
        "critic, reference and reward model: none, as RLOO without a KL needs none",
    ]
    if device.is_cuda:
        return always
    return [
        *always,
        "torch.cuda.current_device and torch.cuda.synchronize: answer for the CPU; the replay buffer, ppo_train, "
        "all_reduce, fit and forward call them",
        "convert_to_torch_dtype: knows fp32 too; bf16 is about ten times slower on a CPU without AVX512-BF16",
        "flash_attn.ops.triton.cross_entropy: hidden, since its kernel needs a GPU; OpenRLHF's own fallback runs",
        "--ds.attn_implementation sdpa and --ds.packing_samples off: flash attention needs a GPU",
    ]


class StockStrategy(PolicyStrategy):
    """OpenRLHF's strategy except for the device: as there, losses are divided by the accumulation steps."""

    backward = DeepspeedStrategy.backward


class LocalGroup:
    """`RayActorGroup` of one actor in this process: it returns results instead of references to them."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def async_run_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self.actor, method_name)(*args, **kwargs)]

    def async_run_method_batch(self, method_name: str, **kwargs: Any) -> list[Any]:
        n = len(next(iter(kwargs.values())))
        return [self.actor.execute_batch(method_name, kwargs, 0, n)]


class Contestant:
    """Phases are timed around the actor's calls to its model and its strategy."""

    def __init__(self, setup: Setup) -> None:
        self.overrides = overrides_of(setup.device)
        self.timers = Timers(setup.device)
        self.args = arguments(setup)
        self.args.ds.packing_samples = setup.device.attn_implementation == "flash_attention_2"
        self.args.vllm.sync_backend = "gloo"
        _replace_ray()
        if not setup.device.is_cuda:
            _answer_for_cpu()
        address, port = single_rank()
        self.strategy = StockStrategy(self.args, setup.device)
        self.actor = _PolicyModelActor(1, 0, address, port)
        self.actor.init_model_from_pretrained(self.strategy, setup.model, max_steps=MAX_STEPS, vllm_engines=None)
        if not setup.device.is_cuda:
            torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
        self.maker = experience_maker.RemoteExperienceMaker(
            LocalGroup(self.actor),
            None,
            None,
            None,
            FixedKLController(self.args.algo.kl.init_coef),
            self.strategy,
            SimpleNamespace(pad_token_id=PAD_ID),
        )
        model = self.actor.actor
        model.forward = self.timers.wrap(
            lambda: "forward" if torch.is_grad_enabled() else "old_logprobs", model.forward
        )
        self.strategy.backward = self.timers.wrap("backward", self.strategy.backward)
        self.strategy.optimizer_step = self.timers.wrap("optimizer", self.strategy.optimizer_step)

    @property
    def network(self) -> Any:
        return self.actor.actor.model.module

    def prepare(self, case: Case, group: Group) -> None:
        set_sizes(self.args, case)
        set_checkpointing(self.network, self.args, case)
        trainer, engine = self.actor.trainer, self.actor.actor.model
        trainer.micro_train_batch_size = trainer.replay_buffer.sample_batch_size = case.micro_batch
        self.strategy.accumulated_gradient = case.samples // case.micro_batch
        engine.set_train_micro_batch_size(case.micro_batch)
        engine.set_train_batch_size(case.samples)
        # DeepSpeed updates when this count is a multiple of the accumulation steps.
        engine.micro_steps = 0
        self.samples = [_experience(group, k, reward) for k, reward in enumerate(_rewards(group))]

    def step(self) -> Outcome:
        experiences = self.maker.make_experience_batch(self.samples)
        logprob_sum = sum(float(e.action_log_probs.sum()) for e in experiences)
        self.maker.actor_model_group.async_run_method_batch("append", experience=experiences)
        status = self.actor.fit(kl_ctl=self.maker.kl_ctl.value)
        return Outcome(
            loss=float(status["policy_loss"]),
            facts={"logprob_sum": logprob_sum, "grad_norm": float(status["actor_grad_norm"])},
        )


def _rewards(group: Group) -> list[float]:
    """[K] REAL's reward of each rollout, as a reward function would have computed it."""
    scores = group_scores(group, SCALE.tensor(), SCALE.target(group.label))
    rewards: list[float] = RealObjective()(scores).rewards.tolist()
    return rewards


def _experience(group: Group, index: int, reward: float) -> Experience:
    """One rollout in the form that `SamplesGenerator._process_response_into_experience` gives it."""
    response = group.rollouts[index].token_ids
    sequence = torch.cat([group.prompt_ids, response])
    action_mask = torch.zeros_like(sequence)
    action_mask[len(group.prompt_ids) :] = 1
    return Experience(
        sequences=sequence[None],
        attention_mask=torch.ones_like(sequence)[None],
        action_mask=action_mask[None, 1:],
        prompts=[""],
        labels=[str(group.label)],
        images=[None],
        mm_train_inputs=[None],
        rewards=torch.tensor([reward], dtype=torch.float32),
        scores=torch.tensor([reward], dtype=torch.float32),
        response_length=torch.tensor([len(response)]),
        truncated=torch.tensor([False]),
        total_length=torch.tensor([float(len(sequence))]),
        info={"response_clip_ratio": torch.tensor([False]), "reward": torch.tensor([reward])},
    )


def _replace_ray() -> None:
    """Make references the values themselves, see `LocalGroup`."""
    experience_maker.ray = SimpleNamespace(put=lambda value: value, get=lambda value: value)
    ppo_actor.get_tokenizer = lambda *_, **__: SimpleNamespace(pad_token_id=PAD_ID)


def _answer_for_cpu() -> None:
    """Patch this process, see `overrides_of`."""
    original = openrlhf_utils.convert_to_torch_dtype
    openrlhf_utils.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else original(name)
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None
    # While the actor is built, the number of a GPU: the replay buffer names a device by it, which ppo_train never uses.
    torch.cuda.current_device = lambda: 0
