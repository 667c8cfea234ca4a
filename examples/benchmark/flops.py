"""Floating-point operations of a training step, from a model's shape.

A multiplication and an addition are two operations. Only matrix products are counted: linear layers, attention's two
products, the output layer. Norms, softmax, rotary embeddings and the optimizer are left out, as is usual.
"""

from __future__ import annotations

from examples.benchmark.protocol import Case
from real_openrlhf.run.model_shape import DecoderShape as Shape

# Forward passes of a plain step: OpenRLHF's are old log-probs and training; the authors' also an E[score] pass.
FORWARDS = {"openrlhf": 2, "authors": 3}


def rows(case: Case) -> int:
    """Tokens of K separate rows of prompt and response."""
    return case.samples * (case.prompt + case.response)


def needed_tokens(case: Case) -> int:
    """The prompt once and all rollouts."""
    return case.prompt + case.samples * case.response


def needed_pairs(case: Case) -> int:
    """Causal attention within the prompt; a rollout's tokens attend to the prompt and to their own earlier tokens."""
    prompt, response = case.prompt, case.response
    own = response * prompt + response * (response + 1) // 2
    return prompt * (prompt + 1) // 2 + case.samples * own


def needed(shape: Shape, case: Case) -> int:
    """The least that a step needs: one forward pass, and a backward pass with twice its operations.

    It covers the prompt once, all rollouts, and logits for response tokens only; rewards need no second pass.
    """
    logits = case.samples * case.response
    return 3 * shape.forward(tokens=needed_tokens(case), pairs=needed_pairs(case), logits=logits)


def executed(shape: Shape, contestant: str, case: Case) -> int:
    """Roughly what a contestant computes; used for estimates of time only, not for results."""
    again = int(case.gradient_checkpointing)
    if contestant == "real":
        return needed(shape, case) * (3 + again) // 3
    length = case.prompt + case.response
    forward = shape.forward(tokens=rows(case), pairs=case.samples * length * (length + 1) // 2, logits=rows(case))
    return forward * (FORWARDS[contestant] + 2 + again)
