"""The score scale: its values and how the model writes them. Their tokens are in `bound_scale`."""

from __future__ import annotations

import importlib
import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from real_openrlhf.algo.target import Target

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_ANCHOR = "So the overall score is "
# Engines read far fewer (`check_read_tokens`); a range with a zero too many must not fill the memory.
MAX_VALUES = 1000


class ScaleError(ValueError):
    """The scale cannot be used: wrong values, or labels that the tokenizer cannot tell apart."""


@dataclass(frozen=True)
class ScoreScale:
    """Ordered values, each with the string that the model writes.

    values: ascending, distinct, finite; labels: as many distinct, non-empty strings.
    """

    values: tuple[float, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.labels):
            raise ScaleError(f"the scale has {len(self.values)} values but {len(self.labels)} labels")
        if len(self.values) < 2:
            raise ScaleError("a scale needs at least two values")
        if not all(math.isfinite(v) for v in self.values):
            raise ScaleError(f"the scale's values must be finite, got {list(self.values)}")
        if any(b <= a for a, b in zip(self.values, self.values[1:])):
            raise ScaleError(f"the scale's values must ascend, got {list(self.values)}")
        if len(set(self.labels)) != len(self.labels):
            raise ScaleError(f"the scale's labels must differ, got {list(self.labels)}")
        for label in self.labels:
            if not label or label != label.strip():
                raise ScaleError(f"the label {label!r} is empty or has space at an end; put the space into the anchor")

    @classmethod
    def parse(cls, text: str) -> ScoreScale:
        """From a flag: "1-5" or "-5-5" (a range of integers), "1,2,4" or "1=Bad,2=Fair,3=Good".

        >>> ScoreScale.parse("1-5").labels
        ('1', '2', '3', '4', '5')
        """
        text = text.strip()
        ends = re.fullmatch(r"(-?\d+)\s*-\s*(-?\d+)", text)
        if ends:
            if max(len(ends[1]), len(ends[2])) > 18 or int(ends[2]) - int(ends[1]) >= MAX_VALUES:
                raise ScaleError(f"the scale {_short(text)} has more than {MAX_VALUES} values")
            low, high = int(ends[1]), int(ends[2])
            if high <= low:
                raise ScaleError(f"the scale {text!r} does not ascend")
            return cls(tuple(float(v) for v in range(low, high + 1)), tuple(str(v) for v in range(low, high + 1)))
        values, labels = [], []
        if text.count(",") >= MAX_VALUES:
            raise ScaleError(f"the scale {_short(text)} has more than {MAX_VALUES} values")
        for item in text.split(","):
            value, equals, label = (part.strip() for part in item.partition("="))
            try:
                values.append(float(value))
            except ValueError:
                raise ScaleError(
                    f"cannot read {_short(item)} in the scale {_short(text)}; write it as '1-5', '0,1,2' or "
                    "'1=Bad,2=Good'"
                ) from None
            labels.append(label if equals else value)
        return cls(tuple(values), tuple(labels))

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        """The form that `parse` reads."""
        values = [f"{value:g}" if float(f"{value:g}") == value else repr(value) for value in self.values]
        if all(label == value for value, label in zip(values, self.labels)):
            return ",".join(self.labels)
        return ",".join(f"{value}={label}" for value, label in zip(values, self.labels))

    def tensor(self) -> Tensor:
        """[S] float64."""
        import torch  # imported here, since a scale is parsed with the flags, before torch is imported

        return torch.tensor(self.values, dtype=torch.float64)

    def target(self, value: float) -> Target:
        """A label y expressed by its two neighbours on the scale, y = (1 - w) low + w high.

        Raises ScaleError outside [lowest, highest] and for anything that is not a finite number.

        >>> ScoreScale.parse("1-5").target(3.25)
        Target(value=3.25, low=2, high=3, weight=0.25)
        """
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ScaleError(f"a score must be a finite number, got {value!r}")
        if not self.values[0] <= value <= self.values[-1]:
            raise ScaleError(f"{value!r} is off the scale [{self.values[0]:g}, {self.values[-1]:g}]")
        high = bisect_left(self.values, value)
        if self.values[high] == value:
            return Target(value=float(value), low=high, high=high, weight=0.0)
        low = high - 1
        weight = (value - self.values[low]) / (self.values[high] - self.values[low])
        return Target(value=float(value), low=low, high=high, weight=weight)

    def is_correct(self, label_index: int | None, target: Target) -> bool:
        """Whether a decoded score is the label nearest to y; at a tie either neighbour is correct."""
        return label_index in target.nearest


def _short(text: str) -> str:
    """A text that a user gave, for messages."""
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")


def __getattr__(name: str) -> Any:
    # Model cards of earlier exports import `bind_scale` from here.
    if name == "bind_scale":
        return importlib.import_module("real_openrlhf.algo.bound_scale").bind_scale
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
