"""A real vLLM engine in bf16: its logits are not rounded to bf16, and a sync still reaches its output layer."""

from __future__ import annotations

import pytest
import torch

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.common.device import SYNC_TOLERANCE
from tests.integration.test_rollout_engine import WORDS, Stack, prompts, stack

__all__ = ["stack"]  # the fixture

pytestmark = pytest.mark.integration
KINDS = {
    "tied": {"tied": True, "dtype": "bf16"},
    "untied": {"tied": False, "dtype": "bf16"},
    "in_bf16": {"tied": True, "dtype": "bf16", "fp32_head": False},
}
# A logit in bf16 has 8 bits: from 2^-6 on it is a multiple of 2^-13, and so are differences of such logits. Logits of
# the test's model are about 1.5 large, so that few lie below.
GRID = 2.0**-13


@torch.no_grad()
def mean_difference(stack: Stack) -> float:
    """Mean |engine - transformers|, the latter in fp32 on the same bf16 weights, over random text."""
    exact = type(stack.model)(stack.model.config).eval()
    exact.load_state_dict({name: p.bfloat16().float() for name, p in stack.model.state_dict().items()})
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, len(WORDS), (n,), generator=generator).tolist() for n in (60, 140)]
    gaps = []
    for ids, got in zip(texts, stack.run(stack.engine.prompt_logprobs(texts))):
        want = exact(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        gaps.append((got - want[:, 0]).abs())
    return float(torch.cat(gaps).mean())


def share_on_grid(stack: Stack) -> float:
    """The share of differences between the score labels' log-probs that are multiples of the grid."""
    sampling = Sampling(n=8, temperature=1.0, top_p=1.0, max_new_tokens=24, seed=7)
    groups = stack.run(stack.engine.generate(prompts(20), sampling))
    read = [r.score_logprobs[0] for g in groups for r in g.rollouts if r.reading.position is not None]
    assert len(read) > 10
    steps = torch.stack([row[1:] - row[0] for row in read]).double() / GRID
    # log-probs are fp32 numbers below 16: off by less than 2^-20, and their difference by less than 0.02 steps.
    return float(((steps - steps.round()).abs() < 0.02).double().mean())


@pytest.mark.parametrize(
    ("stack", "kind"),
    [
        pytest.param(options, name, id=name, marks=[pytest.mark.slow] if name != "tied" else [])
        for name, options in KINDS.items()
    ],
    indirect=["stack"],
)
def test_the_output_layer_of_a_bf16_engine(stack: Stack, kind: str) -> None:
    stack.connect("gloo")
    assert mean_difference(stack) > 2 * SYNC_TOLERANCE["bf16"]
    stack.sync(1)
    assert mean_difference(stack) < SYNC_TOLERANCE["bf16"] / 2
    stack.perturb()
    assert mean_difference(stack) > 2 * SYNC_TOLERANCE["bf16"]
    stack.sync(2)
    assert mean_difference(stack) < SYNC_TOLERANCE["bf16"] / 2
    share = share_on_grid(stack)
    # What has a finer grid is a multiple of the coarse one by chance, in 4 of 100 cases.
    assert share > 0.8 if kind == "in_bf16" else share < 0.3
