"""Finds numbers that are NaN or infinite before they reach the weights, and ends an update without a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from real_openrlhf.algo.batch import Row


class LargestGradient:
    """The largest absolute value in the gradients of all backward passes since `reset`; NaN if one of them is NaN.

    It looks at each gradient as it is computed, before DeepSpeed adds it up, shares it out or moves it, so it is the
    same for every ZeRO stage. It costs one pass over the gradient, and no memory.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._largest: Tensor | None = None
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    def _see(self, gradient: Tensor) -> None:
        if not gradient.numel():
            return
        largest = torch.linalg.vector_norm(gradient.detach(), float("inf")).float()
        # `maximum` passes NaN on. The GPU is not waited for.
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def reset(self) -> None:
        self._largest = None

    @property
    def finite(self) -> bool:
        return self._largest is None or bool(torch.isfinite(self._largest))


def finite_rows(rows: Sequence[Row]) -> bool:
    """Whether all numbers that came with the rollouts are: the engine's and the reference's log-probs, coefficients.

    An engine's log-prob of a label may be -inf, that of a sampled token not.
    """
    for row in rows:
        rollout, coefficients = row.rollout, row.group.coefficients
        weights = (coefficients.cot, coefficients.score, coefficients.squared_error, coefficients.likelihood)
        found = [weight[row.index] for weight in weights]
        if rollout.logprobs is not None:
            if rollout.score_logprobs.isnan().any():
                return False
            found.append(rollout.logprobs)
        if row.group.ref_logprobs is not None:
            found.append(row.group.ref_logprobs[row.index])
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            return False
    return True


@contextmanager
def without_step(engine: Any) -> Iterator[None]:
    """Inside, DeepSpeed's `engine.step()` throws the gradients away: weights, moments and learning rate stay."""
    optimizer = engine.optimizer
    had, before = hasattr(optimizer, "overflow"), getattr(optimizer, "overflow", False)
    wrapped = vars(optimizer).get("step")  # by torch's schedules
    # What DeepSpeed does with gradients of fp16 that overflow: ZeRO's optimizers look at it in their step, and the
    # engine for its schedule. Others would step even so.
    optimizer.overflow = True
    if not had:
        optimizer.step = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if had:
            optimizer.overflow = before
        else:
            del optimizer.overflow, optimizer.step
            if wrapped is not None:
                optimizer.step = wrapped
