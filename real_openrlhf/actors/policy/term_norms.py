"""Gradient norms of each term of the loss: at the logits or at the parameters.

At the logits (`term_norms`) this needs no second backward pass through the network. At the parameters
(`ParameterNorms`) it needs a forward pass, two backward passes and the memory of two gradients. The two answer
different questions: a term with gradients at few logits may still change the parameters much.

A term depends on a row of logits only through the log-probs of a few tokens, its picks, and through the row's entropy.
So its gradient at the row is (e - G p - h p (log p + H)) / T: e holds the picks' gradients, G is their sum, h is the
entropy's gradient. Its norm is computed from the moments of p that the forward pass returned, without the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from real_openrlhf.actors.policy.model import PolicyOutputs
from real_openrlhf.actors.policy.strategy import PolicyStrategy
from real_openrlhf.algo.batch import RealBatch


class ParameterNorms:
    """Gradients of Term 1 and Term 2 at the parameters, added up over the micro-batches of an update.

    Every rank needs complete gradients, so this does not work with ZeRO 3, where parameters are sharded.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._sums: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters] for name in ("term1", "term2")
        }

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """terms: of `policy_loss`, from a forward pass that bypasses DeepSpeed. Its hooks would end every backward pass
        by reducing gradients that do not exist here."""
        both = {"term1": terms["cot"], "term2": terms["squared_error"] + terms["likelihood"]}
        for name, term in both.items():
            gradients = torch.autograd.grad(term, self._parameters, retain_graph=True, allow_unused=True)
            for total, gradient in zip(self._sums[name], gradients):
                if gradient is not None:
                    total += gradient

    def norms(self, strategy: PolicyStrategy) -> dict[str, float]:
        """Both norms over all ranks, and the cosine between the two gradients (0 if one of them is 0)."""
        inner = {"term1": 0.0, "term2": 0.0, "both": 0.0}
        for first, second in zip(self._sums["term1"], self._sums["term2"]):
            a, b = (strategy.add_over_ranks(x).double().flatten() for x in (first, second))
            for name, x, y in (("term1", a, a), ("term2", b, b), ("both", a, b)):
                inner[name] += float(x @ y)
        first_norm, second_norm = math.sqrt(inner["term1"]), math.sqrt(inner["term2"])
        product = first_norm * second_norm
        return {
            "param_grad_norm/term1": first_norm,
            "param_grad_norm/term2": second_norm,
            "param_grad_norm/cosine": inner["both"] / product if product else 0.0,
        }


def term_norms(
    outputs: PolicyOutputs,
    batch: RealBatch,
    terms_of: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
    *,
    temperature: float,
) -> dict[str, float]:
    """Squared norm of each term's gradient at the logits that predict the N rollouts.

    outputs: must have moments. terms_of: token log-probs [N, T], label log-probs [N, S], entropy [N, T] -> the terms.
    The logits that predict a rollout's first token count once per rollout, as if no prompt were shared.
    """
    leaves = [
        x.detach().requires_grad_() for x in (outputs.token_logprobs, outputs.candidate_logprobs, outputs.entropy)
    ]
    tokens, candidates, entropy = leaves
    terms = terms_of(tokens, batch.score_rows.label_logprobs(candidates), entropy)
    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]
        norms[name] = _square(outputs, batch, *(g.double() for g in filled)) / temperature**2
    return norms


def _square(outputs: PolicyOutputs, batch: RealBatch, tokens: Tensor, candidates: Tensor, entropy: Tensor) -> float:
    assert outputs.moments is not None
    mask, rows = batch.response_mask, batch.score_rows
    real = rows.token_ids >= 0
    n, length = mask.shape
    # A place for each token of each sequence (rollouts, then branches), and one more, since a score row may come after
    # the last token.
    shape = n + len(rows.branches), max([length, *(rows.position + 1).tolist()])
    logit_row = batch.logit_row.new_zeros(shape)
    logit_row[:n, :length] = batch.logit_row
    logit_row[rows.sequence, rows.position] = batch.score_row
    entropies, first, second, third = outputs.moments.double()[:, logit_row.flatten()]
    pull = entropy.new_zeros(shape)
    pull[:n, :length] = entropy
    pull = pull.flatten()
    score_place = rows.sequence * shape[1] + rows.position
    rollout, position = mask.nonzero(as_tuple=True)
    place = torch.cat([rollout * shape[1] + position, score_place[:, None].expand_as(real)[real]])
    token = torch.cat([batch.response_ids[mask], rows.token_ids[real]])
    grad = torch.cat([tokens[mask], candidates[real]])
    logprob = torch.cat([outputs.token_logprobs[mask], outputs.candidate_logprobs[real]]).detach().double()
    total = torch.zeros_like(first).index_add(0, place, grad)

    # Picks of the same token at the same place (the sampled score and its label) add up.
    _, same = torch.stack([place, token]).unique(dim=1, return_inverse=True)
    picks = torch.zeros_like(grad).index_add(0, same, grad)
    cross = grad * logprob.exp() * (total[place] + pull[place] * (logprob + entropies[place]))
    rest = total**2 * first + 2 * total * pull * second + pull**2 * third
    return float(picks.square().sum() - 2 * cross.sum() + rest.sum())
