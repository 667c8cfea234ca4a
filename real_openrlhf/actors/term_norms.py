"""How strongly each term of the loss pulls at the logits, without the logits.

At the logits, because there it needs no second backward pass through the network. A term reaches a
row of logits through log-probs of a few tokens, its picks, and through the row's entropy, so that its
gradient there is (e - G p - h p (log p + H)) / T: e holds the picks' gradients, G is their sum, h the
entropy's. The norm follows from the moments of p that came with the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from real_openrlhf.actors.policy_model import PolicyOutputs
from real_openrlhf.algo.batch import RealBatch


def term_norms(
    outputs: PolicyOutputs,
    batch: RealBatch,
    terms_of: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
    *,
    temperature: float,
) -> dict[str, float]:
    """Squared norm of each term's gradient at the logits that predict the N rollouts.

    outputs: with moments. terms_of: token log-probs [N, T], label log-probs [N, S], entropy [N, T] -> the terms.
    The first token's logits count once per rollout, as if no prompt were shared.
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
    # A place per sequence (rollouts, then branches) and token; a score row may also be behind the last token.
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

    # Picks of one token at one place, the sampled score and the same label's, add up.
    _, same = torch.stack([place, token]).unique(dim=1, return_inverse=True)
    picks = torch.zeros_like(grad).index_add(0, same, grad)
    cross = grad * logprob.exp() * (total[place] + pull[place] * (logprob + entropies[place]))
    rest = total**2 * first + 2 * total * pull * second + pull**2 * third
    return float(picks.square().sum() - 2 * cross.sum() + rest.sum())
