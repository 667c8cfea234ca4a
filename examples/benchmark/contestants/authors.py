"""The passes of the REAL authors' code. A reconstruction, not their code.

Made from what their README says of `verl/workers/actor/real_actor.py` and `dp_actor.py`: log-probs of the rollouts
under the weights that train (no gradient), a second pass without gradient that reads E[score] and the label's
likelihood, then forward and backward. Every pass computes logits of all tokens, prompt included, of right-padded
rows [prompt | rollout], so that every rollout has its own copy of the prompt. Network, ZeRO stage and optimizer are
those of the other contestants, where theirs are verl's and FSDP's.

Parts that would only make it slower are left out: the two passes of a reference policy, the entropy, and a tensor of
rollouts times vocabulary that is never filled. Their E[score] pass gives rewards and advantages; here these come with
the rollouts, so that all contestants minimise the same, and the pass is checked by the E[score] that it reads. Faults
that change numbers but not cost (shifted positions, packing-dependent means) are not reproduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from openrlhf.models import Actor
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.benchmark.contestants.common import (
    Outcome,
    Setup,
    arguments,
    optimizer_config,
    set_checkpointing,
    set_sizes,
    single_rank,
)
from examples.benchmark.protocol import Case
from examples.benchmark.rollouts import SCALE, SCORE_IDS
from examples.benchmark.timers import Timers
from real_openrlhf.actors.policy.strategy import PolicyStrategy
from real_openrlhf.algo.objectives.real import RealObjective
from real_openrlhf.algo.types import Group, group_scores


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N rows of a micro-batch: token_ids, attention_mask [N, P + T] int64; responses [N, T] int64.

    cot_mask [N, T] bool; score_position [N]: index into the response; advantages [N] float32.
    """

    token_ids: Tensor
    attention_mask: Tensor
    responses: Tensor
    cot_mask: Tensor
    score_position: Tensor
    advantages: Tensor


class Contestant:
    """Four passes over the rollouts, one of them backward."""

    overrides: ClassVar[list[str]] = [
        "the authors' code: rebuilt from the description in their README, on this project's DeepSpeed strategy",
        "advantages: come with the rollouts instead of the E[score] pass, so that all contestants minimise the same",
    ]

    def __init__(self, setup: Setup) -> None:
        self.device = setup.device
        self.timers = Timers(setup.device)
        self.args = arguments(setup)
        self.objective = RealObjective()
        single_rank()
        self.strategy = PolicyStrategy(self.args, setup.device)
        self.strategy.setup_distributed()
        model = AutoModelForCausalLM.from_pretrained(
            setup.model,
            dtype=setup.device.torch_dtype,
            attn_implementation=setup.device.attn_implementation,
            trust_remote_code=False,
        )
        model.config.use_cache = False
        # Holds the engine for the strategy; its own forward is not used.
        self.actor = Actor(model)
        self.actor, self.optimizer, self.scheduler = self.strategy.prepare((self.actor, optimizer_config(self.args)))

    @property
    def network(self) -> Any:
        return self.actor.model.module

    def prepare(self, case: Case, group: Group) -> None:
        set_sizes(self.args, case)
        set_checkpointing(self.network, self.args, case)
        self.case, self.group = case, group

    def step(self) -> Outcome:
        batches = list(self._batches())
        self.actor.eval()
        with torch.no_grad():
            with self.timers.phase("old_logprobs"):
                logprobs = [self._token_logprobs(self._logits(batch), batch) for batch in batches]
            with self.timers.phase("expected_score"):
                scores = [self._scores(self._logits(batch), batch)[0] for batch in batches]
        self.actor.train()
        loss = sum(
            self._forward_backward(batch, last=number == len(batches)) for number, batch in enumerate(batches, start=1)
        )
        with self.timers.phase("optimizer"):
            self.strategy.optimizer_step(self.optimizer, self.actor, self.scheduler, name="actor")
        return Outcome(
            loss=float(loss),
            facts={
                "logprob_sum": float(torch.cat(logprobs).sum()),
                "grad_norm": float(self.strategy.get_grad_norm(self.actor)),
                "expected_score": float(torch.cat(scores).mean()),
            },
        )

    def _forward_backward(self, batch: Batch, *, last: bool) -> Tensor:
        """One micro-batch's part of the loss, detached. A function, so that its logits are freed at its end."""
        self.strategy.mark_boundary(self.actor, last=last)
        with self.timers.phase("forward"):
            logits = self._logits(batch)
            loss = self._loss(self._token_logprobs(logits, batch), *self._scores(logits, batch), batch)
            # The autograd graph keeps what it needs of the logits.
            del logits
        with self.timers.phase("backward"):
            self.strategy.backward(loss, self.actor)
        return loss.detach()

    def _batches(self) -> Iterator[Batch]:
        """Micro-batches in the rollouts' order, on the device."""
        target = SCALE.target(self.group.label)
        coefficients = self.objective(group_scores(self.group, SCALE.tensor(), target))
        for start in range(0, self.case.samples, self.case.micro_batch):
            chosen = self.group.rollouts[start : start + self.case.micro_batch]
            lengths = torch.tensor([r.token_ids.numel() for r in chosen])
            responses = torch.nn.utils.rnn.pad_sequence([r.token_ids for r in chosen], batch_first=True)
            columns = torch.arange(responses.shape[1])
            prompts = self.group.prompt_ids.expand(len(chosen), -1)
            position = torch.tensor([r.cot_length for r in chosen])
            batch = Batch(
                token_ids=torch.cat([prompts, responses], 1),
                attention_mask=torch.cat([torch.ones_like(prompts), (columns < lengths[:, None]).long()], 1),
                responses=responses,
                cot_mask=columns < position[:, None],
                score_position=position,
                advantages=coefficients.cot[start : start + len(chosen)].float(),
            )
            yield Batch(**{name: value.to(self.device.current()) for name, value in vars(batch).items()})

    def _logits(self, batch: Batch) -> Tensor:
        """[N, P + T, V], of every token."""
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = self.actor.model(
            input_ids=batch.token_ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False
        )
        logits: Tensor = output.logits
        return logits

    def _token_logprobs(self, logits: Tensor, batch: Batch) -> Tensor:
        """[N, T] log-probs of the responses, row by row as verl does it."""
        width = batch.responses.shape[1]
        logits = logits[:, -width - 1 : -1]
        normalisers = torch.stack([row.float().logsumexp(-1) for row in logits])
        return logits.gather(-1, batch.responses[..., None])[..., 0].float() - normalisers

    def _scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """E[score] and the label's log-prob, [N] each, from the row that predicts the score."""
        rows = torch.arange(len(logits), device=logits.device)
        logprobs = logits[rows, len(self.group.prompt_ids) - 1 + batch.score_position].float().log_softmax(-1)
        of_scores = logprobs[:, torch.tensor(SCORE_IDS, device=logits.device)]
        expected = (of_scores.exp() * SCALE.tensor().to(of_scores)).sum(-1)
        return expected, of_scores[:, SCALE.target(self.group.label).low]

    def _loss(self, logprobs: Tensor, expected: Tensor, likelihood: Tensor, batch: Batch) -> Tensor:
        """Eq. 8 of the paper on N of K rollouts: a sum over tokens, a mean over all K."""
        exploration = -(batch.advantages[:, None] * logprobs * batch.cot_mask).sum()
        refinement = ((expected - self.group.label) ** 2 - self.objective.lam * likelihood).sum()
        return (exploration + self.objective.beta * refinement) / self.case.samples
