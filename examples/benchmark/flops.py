"""Floating-point operations of a training step, from a model's shape.

A multiplication and an addition are two operations. Only matrix products are counted: linear layers, attention's two
products, the output layer. Norms, softmax, rotary embeddings and the optimizer are left out, as is usual.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from examples.benchmark.protocol import Case

# Forward passes of a plain step: OpenRLHF's are old log-probs and training; the authors' also an E[score] pass.
FORWARDS = {"openrlhf": 2, "authors": 3}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder on which its operations depend (Llama, Mistral, Qwen2 and Qwen3 families)."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: Path) -> Shape:
        """From a Hugging Face folder's config.json."""
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        return cls(
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )

    def linears(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how many in the whole model) of the linear layers, without the output layer."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, query, self.layers),
            (self.hidden, keys, 2 * self.layers),
            (query, self.hidden, self.layers),
            (self.hidden, self.intermediate, 2 * self.layers),
            (self.intermediate, self.hidden, self.layers),
        ]

    def forward(self, *, tokens: int, pairs: int, logits: int) -> int:
        """One forward pass over `tokens`. pairs: of a query and a key that it attends to. logits: rows of logits."""
        per_token = sum(2 * inputs * outputs * count for inputs, outputs, count in self.linears())
        per_pair = 2 * 2 * self.heads * self.head_dim * self.layers
        return per_token * tokens + per_pair * pairs + 2 * self.hidden * self.vocabulary * logits


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
