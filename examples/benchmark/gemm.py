"""How fast this machine multiplies matrices: the shapes of a model's linear layers, all threads, the training dtype.

    python -m examples.benchmark.gemm --model DIR --device cpu

prints one JSON line: the rate over the products of one forward pass, each with the median of its repeats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from examples.benchmark.flops import Shape
from examples.benchmark.timers import Timers
from real_openrlhf.common.device import Device

ROWS = 1024  # tokens per product: as many as a step's chunks have, few enough for 151,936 outputs
REPEATS = 5


def rate(shapes: list[tuple[int, int, int]], timed: Callable[[int, int], float], rows: int) -> float:
    """Operations per second. shapes: (inputs, outputs, how many); timed(inputs, outputs) -> seconds of a product."""
    flops = sum(2 * rows * inputs * outputs * count for inputs, outputs, count in shapes)
    return flops / sum(timed(inputs, outputs) * count for inputs, outputs, count in shapes)


def measure(shape: Shape, device: Device, *, rows: int = ROWS, repeats: int = REPEATS) -> dict[str, Any]:
    """{"flops_per_second", "rows", "repeats", "threads", "dtype"}."""

    # On a GPU, one product ends before Python has launched the next, so several are timed together.
    calls = 10 if device.is_cuda else 1

    def timed(inputs: int, outputs: int) -> float:
        x, weight = (torch.randn(n, inputs, dtype=device.torch_dtype, device=device.current()) for n in (rows, outputs))
        out = x.new_empty(rows, outputs)
        timers, seconds = Timers(device), []
        for _ in range(repeats + 1):
            device.synchronize()
            start = timers.mark()
            for _ in range(calls):
                torch.mm(x, weight.T, out=out)
            end = timers.mark()
            device.synchronize()
            seconds.append(timers.between(start, end) / calls)
        return median(seconds[1:])  # the first one maps memory and starts threads

    shapes = [*shape.linears(), (shape.hidden, shape.vocabulary, 1)]
    return {
        "flops_per_second": rate(shapes, timed, rows),
        "rows": rows,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "dtype": device.dtype_name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder whose shapes are multiplied")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(json.dumps(measure(Shape.of(args.model), Device.resolve(args.device))))


if __name__ == "__main__":
    main()
