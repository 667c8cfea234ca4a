"""OpenRLHF's trainer, policy actor and engine with REAL's two terms; see `real_openrlhf.patch`.

The trainer finds the score position in the token ids and hands the loss what the same forward pass says there. All
else is OpenRLHF's own `training_step`: KL, entropy, accumulation, averages, logs.
"""

from __future__ import annotations

from typing import Any

from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer, PolicyModelActor
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from torch import Tensor

from real_openrlhf.data.tokenizer import end_token_ids
from real_openrlhf.dropin.settings import RealSettings
from real_openrlhf.dropin.tensors import label_logprobs, read_scores
from real_openrlhf.dropin.terms import Terms

# OpenRLHF wraps its classes with @ray.remote; these are the plain ones inside.
_PolicyActor: Any = PolicyModelActor.__ray_metadata__.modified_class.__ray_actor_class__
_Engine: Any = RolloutRayActor.__ray_metadata__.modified_class.__ray_actor_class__


class TermsTrainer(ActorPPOTrainer):
    """A trainer that OpenRLHF made becomes one by `add_terms`."""

    @staticmethod
    def add_terms(trainer: Any, terms: Terms) -> None:
        """trainer: OpenRLHF's ActorPPOTrainer, complete."""
        trainer.__class__ = TermsTrainer
        end_ids = end_token_ids(trainer.args.actor.model_name_or_path, trainer.tokenizer)
        trainer.score_reader = terms.settings.reader(trainer.tokenizer, end_ids)
        trainer.terms_loss = terms.loss(*trainer.args.actor.eps_clip_low_high)
        trainer.actor.register_forward_hook(trainer.keep_logits)

    def keep_logits(self, actor: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):  # in training_step; elsewhere the Actor returns log-probs alone
            self.logits = output[1]["logits"]

    def training_step(
        self, experience: Any, kl_ctl: float, step: int, loss_batch_info: dict[str, Any] | None = None
    ) -> Any:
        mask = experience.attention_mask
        scores = read_scores(experience.sequences, mask, experience.action_mask, self.score_reader)

        def loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, **named: Any) -> Any:
            at_score = label_logprobs(self.logits, scores, attention_mask=mask)
            named |= {"label_logprobs": at_score, "readable": scores.readable, "labels": experience.labels}
            return self.terms_loss(log_probs, old_log_probs, advantages, **named)

        self.actor_loss_fn = loss
        try:
            return super().training_step(experience, kl_ctl, step, loss_batch_info)
        finally:
            self.logits = None  # as large as the activations


class TermsPolicyActor(_PolicyActor):  # type: ignore[misc]
    # Ray demands that a subclass of a class it has wrapped defines __init__.
    def __init__(self, world_size: int, rank: int, master_addr: str | None, master_port: int | None) -> None:
        super().__init__(world_size, rank, master_addr, master_port)

    def init_model_from_pretrained(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        super().init_model_from_pretrained(strategy, *args, **kwargs)
        TermsTrainer.add_terms(self.trainer, strategy.args.real)


class TermsEngine(_Engine):  # type: ignore[misc]
    """OpenRLHF's engine with REAL's agent (`terms.AGENT_FILE`). settings: set in a subclass of the driver's."""

    settings = RealSettings()

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        await super().__init__(*args, **kwargs)
        self.executor.settings = self.settings
