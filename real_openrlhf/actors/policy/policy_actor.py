"""One rank of the policy: OpenRLHF's policy actor with the REAL trainer, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deepspeed
import torch
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from torch import Tensor, distributed
from torch.nn.utils.rnn import pad_sequence

from real_openrlhf.actors.policy.lora import Weight, add_adapters, save_adapter, weights_of, without_adapters
from real_openrlhf.actors.policy.model import PolicyModel
from real_openrlhf.actors.policy.reference_actor import response_logprobs
from real_openrlhf.actors.policy.shards import load_shards, restore_rng, rng_state, save_shards
from real_openrlhf.actors.policy.spec import PolicySpec
from real_openrlhf.actors.policy.strategy import PolicyStrategy, add_up_in_fp32
from real_openrlhf.actors.policy.trainer import RealTrainer
from real_openrlhf.actors.sync.cuda_ipc import place
from real_openrlhf.actors.sync.transfer import Bucket, SyncGroup, make_plan, send_bucket
from real_openrlhf.algo.types import TrainGroup
from real_openrlhf.common import durable

# OpenRLHF wraps its class with @ray.remote; this is the plain class inside.
_OpenRLHFPolicyActor = PolicyModelActor.__ray_metadata__.modified_class.__ray_actor_class__

# Folder inside an exported model with the LoRA adapter, for peft.
_ADAPTER_FOLDER = "adapter"
# Most tokens in one forward of the agreement check: 2.5 GB of fp32 logits with a vocabulary of 152,000.
_PROBE_TOKENS = 4096


class RealPolicyActor(_OpenRLHFPolicyActor):  # type: ignore[misc, valid-type]
    """Methods are called on all ranks at once; results of rank 0 count."""

    # Ray demands that a subclass of a class it has wrapped defines __init__.
    def __init__(self, world_size: int, rank: int, master_addr: str | None, master_port: int | None) -> None:
        super().__init__(world_size, rank, master_addr, master_port)

    def build(self, spec: PolicySpec, *after: Any) -> dict[str, Any]:
        """Load the model, shard it, make the optimizer. Returns facts for the log (rank 0's are shown).

        after: refs that Ray waits for before it calls this; their values are not used.
        """
        self.spec = spec
        args = spec.args
        torch.set_num_threads(spec.device.trainer_threads(spec.ranks_per_node))
        strategy = PolicyStrategy(args, spec.device)
        self._setup_distributed(strategy)
        spec.device.check_card()
        model = PolicyModel(
            spec.path,
            device=spec.device,
            attn_implementation=spec.attention,
            ds_config=strategy.get_ds_train_config(),
            temperature=args.rollout.temperature,
            max_logit_bytes=spec.max_logit_bytes,
            use_liger_kernel=spec.args.ds.use_liger_kernel,
        )
        if spec.lora.rank:
            add_adapters(model.model, spec.lora, spec.seed)
        if args.actor.gradient_checkpointing_enable:
            model.gradient_checkpointing_enable({"use_reentrant": args.actor.gradient_checkpointing_reentrant})
            if spec.lora.rank:
                # With frozen embeddings, checkpointed activations would have no gradient path. Not asked for without
                # checkpointing: the backward pass then ends at the lowest adapter.
                model.model.enable_input_require_grads()
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
        add_up_in_fp32(self.actor_optim)
        packed_gap = self.actor.check_packed_rows(spec.text)
        self.trainer = RealTrainer(
            strategy,
            self.actor,
            self.actor_optim,
            self.actor_scheduler,
            values=torch.tensor(spec.values, dtype=torch.float64),
            options=spec.options,
            trains_score_token=spec.trains_score_token,
            term_grad_norm_steps=spec.term_grad_norm_steps,
            norms_at_parameters=spec.norms_at_parameters,
        )
        self.weight_version = 0
        self.n_reference_forwards = 0
        self._sync_group: SyncGroup | None = None
        if args.ds.enable_sleep:
            self.offload_states()
        return {
            "parameters": sum(_full_numel(w.parameter) for w in self._weights()),
            "trainable_parameters": sum(_full_numel(p) for p in self._network.parameters() if p.requires_grad),
            "packed_gap": packed_gap,
            "dtype": spec.device.dtype_name,
            "attention": spec.attention,
            "layers": "Liger's" if self.actor.use_liger_kernel else "the model's own",
            "threads": torch.get_num_threads(),
        }

    def train(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Train on this rank's groups; afterwards the policy has a new version of its weights."""
        metrics = self.trainer.ppo_train(groups)
        if self.spec.args.train.colocate_all:
            # Engines on the same GPU need the memory. Where there are none, freeing it would only slow the next step.
            self.spec.device.empty_cache()
        self.weight_version += 1
        return metrics

    def counts(self) -> dict[str, int]:
        """Numbers of rollouts that went forward and backward, and of optimizer updates, on this rank."""
        trainer = self.trainer
        return {
            "forwards": trainer.n_forwards,
            "backwards": trainer.n_backwards,
            "updates": trainer.n_updates,
            "reference_forwards": self.n_reference_forwards,
        }

    def reference_logprobs(self, groups: Sequence[TrainGroup]) -> list[tuple[Tensor, ...]]:
        """With LoRA: log-probs of this rank's groups under the weights that training began with."""
        if not self.spec.lora.rank:
            raise RuntimeError("only a policy with adapters is its own reference")
        with without_adapters(self._network):
            found = response_logprobs(self.actor, groups, self.strategy)
        self.n_reference_forwards += sum(len(group) for group in found)
        return found

    @torch.no_grad()
    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each sequence, the log-probs at temperature 1 of its tokens from the second on: [L - 1] float32."""
        network = self.actor.model
        network.eval()
        result = padded_logprobs(network, sequences, self.spec.device.current())
        network.train()
        return result

    # Weight sync: rank 0 broadcasts to the engines, the other ranks only help to gather. By CUDA IPC every rank sends.

    def free_port(self) -> int:
        """A free port on this rank's node."""
        return int(self._get_free_port())

    def weight_plan(self) -> list[Bucket]:
        """The buckets of a sync, in sending order."""
        named = [(w.name, _full_shape(w.parameter), self.spec.device.vllm_dtype) for w in self._weights()]
        return make_plan(named, self.spec.bucket_bytes)

    def sync_host(self) -> str:
        """`cuda_ipc.place` of this rank."""
        return place(self.spec.device.current())

    def join_sync_group(
        self, address: str, port: int, world_size: int, backend: str, timeout_s: float, buffer_bytes: int = 0
    ) -> None:
        """Rank 0 becomes rank 0 of the group that spans the policy and all engine workers; with ipc, all ranks join."""
        if self._rank == 0 or backend == "ipc":
            self._sync_group = SyncGroup.create(
                address,
                port,
                self._rank,
                world_size,
                backend,
                timeout_s,
                device=self.spec.device.current(),
                buffer_bytes=buffer_bytes,
                senders=self._world_size,
            )

    def send_weights(self, plan: Sequence[Bucket]) -> int:
        """Broadcast every bucket; returns the version that was sent."""
        weights = {w.name: w for w in self._weights()}
        for bucket in plan:
            members = [weights[p.name] for p in bucket.parameters]
            with self._gathered(members):
                if self._sync_group is not None and not self._sync_group.idle:
                    send_bucket(self._sync_group, bucket, [w.value() for w in members])
        if self._sync_group is not None:
            self._sync_group.flush()
        self.spec.device.synchronize()
        # An engine on the same GPU allocates its KV cache next, so torch's unused memory goes back to the driver.
        self.spec.device.empty_cache()
        distributed.barrier()
        return self.weight_version

    def save_model(self, path: str, tokenizer_path: str) -> None:
        """Write a Hugging Face folder, adapters merged; the tokenizer's files come from tokenizer_path.

        With LoRA, a subfolder has the adapter alone.
        """
        network = self._network
        state: dict[str, Tensor] = {}
        adapter: dict[str, Tensor] = {}
        for weight in self._weights():
            with self._gathered([weight]):
                if self._rank == 0:
                    state[weight.name] = weight.value().cpu().clone()
                    adapter.update({name: p.data.cpu().clone() for name, p in weight.adapter.items()})
        if self._rank == 0:
            from transformers import AutoTokenizer

            state.update({name: buffer.cpu() for name, buffer in _persistent_buffers(network).items()})
            Path(path).mkdir(parents=True, exist_ok=True)
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
            network.config.use_cache = True
            end_at(network.generation_config, tokenizer.eos_token_id)
            network.save_pretrained(path, state_dict=state)
            network.config.use_cache = False
            tokenizer.save_pretrained(path)
            if adapter:
                save_adapter(Path(path) / _ADAPTER_FOLDER, network, adapter, self.spec.path)
            durable.fsync_tree(Path(path))  # only the node that wrote the files can force them to the disk
        distributed.barrier()

    def save_checkpoint(self, path: str) -> None:
        """Weights, optimizer and schedule, and this rank's own state. ShardError on every rank if one fails."""
        save_shards(self.actor.model, path, self._own_state())

    def load_checkpoint(self, path: str) -> None:
        """Load what `save_checkpoint` wrote, by the same or by another number of ranks."""
        args = self.spec.args
        self._restore(load_shards(self.actor.model, path, scratch=args.ckpt.path, seed=args.train.seed))

    def sees(self, path: str) -> bool:
        """Whether this rank's node has the file."""
        return Path(path).exists()

    def _own_state(self) -> dict[str, Any]:
        """This rank's state that is not in DeepSpeed's own checkpoint, which holds weights and optimizer."""
        return {
            "weight_version": self.weight_version,
            "n_calls": self.trainer.n_calls,
            "n_updates": self.trainer.n_updates,
            "rng": rng_state(self.spec.device),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.weight_version = state["weight_version"]
        self.trainer.n_calls = state["n_calls"]
        self.trainer.n_updates = state["n_updates"]
        restore_rng(state["rng"], self.spec.device)

    @property
    def _network(self) -> Any:
        """The Hugging Face model inside DeepSpeed's engine."""
        return self.actor.model.module

    def _weights(self) -> list[Weight]:
        return weights_of(self._network)

    def _gathered(self, weights: Sequence[Weight]) -> ExitStack:
        """A context in which every rank has the complete weights, also under ZeRO-3."""
        parts = [part for weight in weights for part in weight.parts]
        # DeepSpeed 0.19 gathers several parameters at once and waits for the last gather only
        # (partition_parameters.py, _allgather_params_coalesced). NCCL gathers in order. gloo has several threads, and a
        # rank that was ahead read parameters that had not arrived yet. Gathered one by one, each is waited for.
        calls = [parts] if self.spec.device.is_cuda else [[part] for part in parts]
        gathered = ExitStack()
        for call in calls:
            gathered.enter_context(deepspeed.zero.GatheredParameters(call, enabled=self.spec.args.ds.zero_stage == 3))
        return gathered


def padded_logprobs(
    network: Any, sequences: Sequence[Sequence[int]], device: torch.device, max_tokens: int = _PROBE_TOKENS
) -> list[Tensor]:
    """For each sequence of L tokens, [L - 1] float32 on the CPU. One forward pass for all, padded on the right.

    All logits of a pass are in memory at once, so above max_tokens, padding counted, there are several passes. Ranks
    that hold shards of the network must be given sequences of the same lengths.
    """
    found: list[Tensor] = []
    per_pass = max(1, max_tokens // max((len(ids) for ids in sequences), default=1))
    for start in range(0, len(sequences), per_pass):
        part = [torch.tensor(list(ids)) for ids in sequences[start : start + per_pass]]
        rows = pad_sequence(part, batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(ids) for ids in part], batch_first=True).to(device)
        logits = network(rows, attention_mask=mask, use_cache=False)["logits"]
        for row, values, ids in zip(rows, logits, part, strict=True):
            n = len(ids)
            logprobs = values[: n - 1].float().log_softmax(-1)
            found.append(logprobs.gather(-1, row[1:n, None])[:, 0].cpu())
    return found


def end_at(generation: Any, end: int | None) -> None:
    """Have a generation config know the tokenizer's end of text, which responses are learned to end with."""
    known = generation.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end is not None and end not in ends:
        generation.eos_token_id = [end, *ends] if ends else end


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
