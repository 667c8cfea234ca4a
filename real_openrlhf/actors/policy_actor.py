"""One rank of the policy: OpenRLHF's policy actor with the REAL trainer, on any device."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from torch import Tensor, distributed

from real_openrlhf.actors.device import Device
from real_openrlhf.actors.policy_model import PolicyModel
from real_openrlhf.actors.policy_strategy import PolicyStrategy
from real_openrlhf.actors.policy_trainer import RealTrainer
from real_openrlhf.actors.weight_transfer import Bucket, SyncGroup, make_plan, send_bucket
from real_openrlhf.algo.loss import LossOptions
from real_openrlhf.algo.types import TrainGroup

# OpenRLHF wraps its class with @ray.remote; the plain class lies under the wrapper.
_OpenRLHFPolicyActor = PolicyModelActor.__ray_metadata__.modified_class.__ray_actor_class__

_CHECKPOINT_TAG = "deepspeed"


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """Everything a rank needs to build itself.

    args                 OpenRLHF's nested arguments (config.openrlhf_args)
    attn_implementation  "auto": the device's default
    values               the score scale's values
    max_steps            optimizer steps of the whole run, for the learning-rate schedule
    logits_mb            megabytes that logits may take in training
    """

    path: str
    args: Any
    device: Device
    attn_implementation: str
    ranks_per_node: int
    values: tuple[float, ...]
    options: LossOptions
    trains_score_token: bool
    term_grad_norm_steps: int
    max_steps: int
    bucket_bytes: int
    logits_mb: int


class RealPolicyActor(_OpenRLHFPolicyActor):  # type: ignore[misc, valid-type]
    """Methods are called on all ranks at once; results of rank 0 count."""

    def __init__(self, world_size: int, rank: int, master_addr: str | None, master_port: int | None) -> None:
        super().__init__(world_size, rank, master_addr, master_port)

    def build(self, spec: PolicySpec) -> dict[str, Any]:
        """Load the model, shard it, make the optimizer. Returns facts for the log (rank 0's are shown)."""
        self.spec = spec
        args = spec.args
        torch.set_num_threads(spec.device.trainer_threads(spec.ranks_per_node))
        # Asked for here: the driver may sit on a node without flash attention.
        attention = spec.attn_implementation if spec.attn_implementation != "auto" else spec.device.attn_implementation
        strategy = PolicyStrategy(args, spec.device)
        self._setup_distributed(strategy)
        model = PolicyModel(
            spec.path,
            device=spec.device,
            attn_implementation=attention,
            ds_config=strategy.get_ds_train_config(),
            temperature=args.rollout.temperature,
            max_logit_bytes=spec.logits_mb * 2**20,
        )
        if args.actor.gradient_checkpointing_enable:
            model.gradient_checkpointing_enable({"use_reentrant": args.actor.gradient_checkpointing_reentrant})
        optimizer_config = dict(
            optim="adam",
            adam=vars(args.actor.adam),
            lr_scheduler=args.actor.lr_scheduler,
            lr_warmup_ratio=args.actor.lr_warmup_ratio,
            min_lr_ratio=args.actor.min_lr_ratio,
            max_norm=args.actor.max_norm,
            scheduler_steps=spec.max_steps,
        )
        self.actor, self.actor_optim, self.actor_scheduler = strategy.prepare((model, optimizer_config))
        self.actor.check_packed_rows()
        self.trainer = RealTrainer(
            strategy,
            self.actor,
            self.actor_optim,
            self.actor_scheduler,
            values=torch.tensor(spec.values, dtype=torch.float64),
            options=spec.options,
            trains_score_token=spec.trains_score_token,
            term_grad_norm_steps=spec.term_grad_norm_steps,
        )
        self.weight_version = 0
        self._sync_group: SyncGroup | None = None
        parameters = self._named_parameters()
        return {
            "parameters": sum(_full_numel(p) for _, p in parameters),
            "dtype": spec.device.dtype_name,
            "attention": attention,
            "threads": torch.get_num_threads(),
        }

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Train on this rank's groups; the policy's weights are a new version afterwards."""
        metrics = self.trainer.ppo_train(groups)
        self.spec.device.empty_cache()
        self.weight_version += 1
        return metrics

    def counts(self) -> dict[str, int]:
        """How many rollouts went forward and backward, and optimizer updates, on this rank."""
        trainer = self.trainer
        return {"forwards": trainer.n_forwards, "backwards": trainer.n_backwards, "updates": trainer.n_updates}

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probs at temperature 1 of each sequence's tokens from the second on: [L - 1] float32 each."""
        network = self.actor.model
        network.eval()
        result = []
        for ids in sequences:
            row = torch.tensor([list(ids)], device=self.spec.device.current())
            logits = network(row, attention_mask=torch.ones_like(row), use_cache=False)["logits"].float()
            logprobs = logits[0, :-1].log_softmax(-1)
            result.append(logprobs.gather(-1, row[0, 1:, None])[:, 0].cpu())
        network.train()
        return result

    # Weight sync: rank 0 broadcasts to the engines, the other ranks help to gather.

    def free_port(self) -> int:
        """A free port on this rank's node."""
        return int(self._get_free_port())

    def weight_plan(self) -> list[Bucket]:
        """The buckets of a sync, in sending order."""
        named = [(name, _full_shape(p), self.spec.device.vllm_dtype) for name, p in self._named_parameters()]
        return make_plan(named, self.spec.bucket_bytes)

    def join_sync_group(self, address: str, port: int, world_size: int, timeout_s: float) -> None:
        """Rank 0 becomes rank 0 of the group that spans the policy and all engine workers."""
        if self._rank == 0:
            backend = self.spec.device.dist_backend
            self._sync_group = SyncGroup.create(address, port, 0, world_size, backend, timeout_s)

    def send_weights(self, plan: Sequence[Bucket]) -> int:
        """Broadcast every bucket; returns the version that was sent."""
        parameters = dict(self._named_parameters())
        zero3 = self.spec.args.ds.zero_stage == 3
        for bucket in plan:
            members = [parameters[p.name] for p in bucket.parameters]
            with deepspeed.zero.GatheredParameters(members, enabled=zero3):
                if self._sync_group is not None:
                    send_bucket(self._sync_group, bucket, [p.data for p in members])
        self.spec.device.synchronize()
        distributed.barrier()
        return self.weight_version

    def save_model(self, path: str, tokenizer_path: str) -> None:
        """Write a Hugging Face folder; the tokenizer's files come from tokenizer_path."""
        module = self.actor.model.module
        zero3 = self.spec.args.ds.zero_stage == 3
        if zero3:
            state: dict[str, Tensor] = {}
            for name, parameter in self._named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], enabled=True):
                    if self._rank == 0:
                        state[name] = parameter.data.detach().cpu().clone()
            if self._rank == 0:
                state.update({name: buffer.cpu() for name, buffer in _persistent_buffers(module).items()})
        else:
            state = module.state_dict()
        if self._rank == 0:
            from transformers import AutoTokenizer

            Path(path).mkdir(parents=True, exist_ok=True)
            module.config.use_cache = True
            module.save_pretrained(path, state_dict=state)
            module.config.use_cache = False
            AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(path)
        distributed.barrier()

    def save_checkpoint(self, path: str) -> None:
        """DeepSpeed's checkpoint of weights, optimizer and schedule, and this rank's own state beside it."""
        self.actor.model.save_checkpoint(path, tag=_CHECKPOINT_TAG, save_latest=False)
        torch.save(self.state_dict(), Path(path) / f"rank_{self._rank}.pt")
        distributed.barrier()

    def load_checkpoint(self, path: str) -> None:
        """The inverse, on as many ranks. RuntimeError when DeepSpeed finds nothing to load."""
        loaded, _ = self.actor.model.load_checkpoint(path, tag=_CHECKPOINT_TAG)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {path}")
        # Our own file, just checked against its manifest; it holds RNG states of numpy and python.
        self.load_state_dict(torch.load(Path(path) / f"rank_{self._rank}.pt", weights_only=False))
        distributed.barrier()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state outside of DeepSpeed's own checkpoint, which holds weights and optimizer."""
        return {
            "weight_version": self.weight_version,
            "n_calls": self.trainer.n_calls,
            "n_updates": self.trainer.n_updates,
            "rng": {
                "torch": torch.get_rng_state(),
                "python": json.dumps(random.getstate()),
                "numpy": numpy.random.get_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight_version = state["weight_version"]
        self.trainer.n_calls = state["n_calls"]
        self.trainer.n_updates = state["n_updates"]
        torch.set_rng_state(state["rng"]["torch"])
        version, internal, gauss = json.loads(state["rng"]["python"])
        random.setstate((version, tuple(internal), gauss))
        numpy.random.set_state(state["rng"]["numpy"])

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names as Hugging Face has them; a tied head appears once, under the embedding's name."""
        return list(self.actor.model.module.named_parameters())


def _full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _full_numel(parameter: torch.nn.Parameter) -> int:
    return int(torch.Size(_full_shape(parameter)).numel())


def _persistent_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return {
        name: value
        for name, value in module.state_dict().items()
        if name not in parameters and name in dict(module.named_buffers())
    }
