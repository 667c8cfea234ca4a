"""The reference policy of the KL: one rank of it, and the function by which every reference computes log-probs.

There are two kinds of reference: separate ranks with the model that training began with (here), and, with LoRA, the
policy's ranks with their adapters switched off (`RealPolicyActor.reference_logprobs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from openrlhf.trainer.ray.launcher import ReferenceModelActor
from torch import Tensor

from real_openrlhf.actors.policy.model import PolicyModel
from real_openrlhf.actors.policy.strategy import PolicyStrategy, equal_micro_batches
from real_openrlhf.algo.batch import collate, rows_of
from real_openrlhf.algo.types import TrainGroup

if TYPE_CHECKING:
    from real_openrlhf.actors.policy.spec import PolicySpec

# OpenRLHF wraps its class with @ray.remote; this is the plain class inside.
_OpenRLHFReferenceActor = ReferenceModelActor.__ray_metadata__.modified_class.__ray_actor_class__


@torch.no_grad()
def response_logprobs(
    model: PolicyModel, groups: Sequence[TrainGroup], strategy: PolicyStrategy
) -> list[tuple[Tensor, ...]]:
    """For every group, K tensors [T] float32 on the CPU: log-probs of the responses, at the model's temperature.

    Computed by the policy's own forward, so that equal weights give a KL of 0 up to rounding.
    """
    model.eval()
    found: dict[tuple[int, int], Tensor] = {}
    for part in equal_micro_batches(rows_of(groups), strategy):
        logprobs = model(collate(part).to(strategy.device.current())).token_logprobs.float().cpu()
        for row, values in zip(part, logprobs):
            found[id(row.group), row.index] = values[: row.length].clone()
    return [tuple(found[id(group), i] for i in range(len(group.group))) for group in groups]


class ReferenceActor(_OpenRLHFReferenceActor):  # type: ignore[misc, valid-type]
    """Methods are called on all ranks at once. It has no state: its weights are always those of spec.path."""

    def __init__(self, world_size: int, rank: int, master_addr: str | None, master_port: int | None) -> None:
        super().__init__(world_size, rank, master_addr, master_port)
        self.n_forwards = 0

    def build(self, spec: PolicySpec, *after: Any) -> dict[str, Any]:
        """Load the model: sharded like the policy under ZeRO-3, else complete on every rank."""
        self.spec = spec
        torch.set_num_threads(spec.device.trainer_threads(spec.ranks_per_node))
        strategy = PolicyStrategy(spec.args, spec.device)
        self._setup_distributed(strategy)
        spec.device.check_card()
        # Without a GPU its weights are in CPU memory anyway.
        offload = spec.args.ref.offload and spec.device.is_cuda
        model = PolicyModel(
            spec.path,
            device=spec.device,
            attn_implementation=spec.attention,
            ds_config=strategy.get_ds_eval_config(offload=offload),
            temperature=spec.args.rollout.temperature,
            max_logit_bytes=spec.max_logit_bytes,
            use_liger_kernel=spec.args.ds.use_liger_kernel,
        )
        # OpenRLHF's strategy reads this attribute of the model.
        model._offload = offload
        self.model = strategy.prepare(model)
        return {"threads": torch.get_num_threads()}

    def reference_logprobs(self, groups: Sequence[TrainGroup]) -> list[tuple[Tensor, ...]]:
        """`response_logprobs` of this rank's groups. All ranks must get equally many rollouts."""
        found = response_logprobs(self.model, groups, self.strategy)
        self.n_forwards += sum(len(group) for group in found)
        self.spec.device.empty_cache()
        return found

    def counts(self) -> dict[str, int]:
        """Number of rollouts that went forward on this rank."""
        return {"reference_forwards": self.n_forwards}
