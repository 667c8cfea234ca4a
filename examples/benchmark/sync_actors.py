"""The actors of `sync_timing`: this project's, which can also use stock OpenRLHF's broadcast."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

from examples.benchmark.sync_stock import without_cuda
from real_openrlhf.actors.engine.rollout_engine import RolloutEngine
from real_openrlhf.actors.policy.policy_actor import RealPolicyActor


class StockEngine(RolloutEngine):
    """An engine whose workers receive as OpenRLHF's do; the calls to them (update_weight) are RolloutRayActor's own."""

    worker_extension = "examples.benchmark.sync_stock.StockWorker"


class StockPolicy(RealPolicyActor):
    """This project's policy rank, which can also send its weights as stock OpenRLHF does."""

    def scale_weights(self, factor: float) -> int:
        """Change the weights, so that a sync that does nothing is detected."""
        with torch.no_grad():
            for parameter in self._network.parameters():
                parameter.mul_(factor)
        self.weight_version += 1
        return self.weight_version

    def join_stock(self, engines: list[Any]) -> None:
        """Form the group of policy and engines by OpenRLHF's own code."""
        trainer = object.__new__(ActorPPOTrainer)
        self.strategy.args.vllm.sync_backend, self.strategy.args.vllm.num_engines = "gloo", len(engines)
        trainer.strategy, trainer.args, trainer.actor = self.strategy, self.strategy.args, self.actor
        trainer.vllm_engines, trainer.use_cuda_ipc = engines, False
        with without_cuda("openrlhf.trainer.ray.ppo_actor"):
            trainer._init_vllm_sync_group("gloo")
        self._stock = trainer

    def broadcast_stock(self) -> None:
        with without_cuda():
            self._stock.broadcast_to_vllm()
