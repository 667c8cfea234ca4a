"""The rule for precision: compute in float32 at least, and in float64 where the input is float64."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """bf16, fp16, bool and integers -> float32; float32 and float64 stay as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
