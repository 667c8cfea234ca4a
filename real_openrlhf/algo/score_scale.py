"""The score scale: its values, their strings, and their tokens in the context of the answer anchor."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from real_openrlhf.algo.label_trie import TokenTrie
from real_openrlhf.algo.types import Target

DEFAULT_ANCHOR = "So the overall score is "

# Weights this close to 0.5 are ties: on a scale like 0.1, 0.2 the middle is not exact in floats.
_TIE = 1e-9


class Tokenizer(Protocol):
    """The two methods of a tokenizer that are used here; every Hugging Face tokenizer has them."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str: ...


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of the ids as they are: special tokens kept, spaces not cleaned up."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class ScaleError(ValueError):
    """The scale cannot be used: wrong values, or labels that the tokenizer does not tell apart."""


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
        """From a flag: "1-5" (a range of integers), "1,2,4" or "1=Bad,2=Fair,3=Good".

        >>> ScoreScale.parse("1-5").labels
        ('1', '2', '3', '4', '5')
        """
        text = text.strip()
        head, dash, tail = text.partition("-")
        if dash and head.strip().isdecimal() and tail.strip().isdecimal():
            low, high = int(head), int(tail)
            if high <= low:
                raise ScaleError(f"the scale {text!r} does not ascend")
            return cls(tuple(float(v) for v in range(low, high + 1)), tuple(str(v) for v in range(low, high + 1)))
        values, labels = [], []
        for item in text.split(","):
            value, equals, label = (part.strip() for part in item.partition("="))
            try:
                values.append(float(value))
            except ValueError:
                raise ScaleError(
                    f"cannot read {item!r} in the scale {text!r}; write it as '1-5', '0,1,2' or '1=Bad,2=Good'"
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
        return torch.tensor(self.values, dtype=torch.float64)

    def target(self, value: float) -> Target:
        """A label y as its two neighbours on the scale, y = (1 - w) low + w high.

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
        """A decoded score is correct when it is nearest to y; at a tie either neighbour is."""
        if label_index is None:
            return False
        if math.isclose(target.weight, 0.5, rel_tol=0.0, abs_tol=_TIE):
            return label_index in (target.low, target.high)
        return label_index == (target.low if target.weight < 0.5 else target.high)

    def worst_squared_error(self, target: Target) -> float:
        """max over v in the scale and 0 of (v - y)^2. 0: missing mass pulls E[score] towards it."""
        return max((v - target.value) ** 2 for v in (0.0, self.values[0], self.values[-1]))


@dataclass(frozen=True)
class BoundAnchor:
    """An anchor with the scale's tokens behind it.

    text    the anchor as configured
    prefix  the text of the tokens before the score: the anchor, less a final space that the
            tokenizer merges into the score's first token (" 4")
    labels  [S] the tokens of each label
    """

    text: str
    prefix: str
    labels: tuple[tuple[int, ...], ...]

    @cached_property
    def trie(self) -> TokenTrie:
        return TokenTrie(self.labels)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """[S] the labels' tokens, where each label is one token; ScaleError where one is several."""
        if not self.trie.is_flat:
            raise ScaleError(
                f"after the anchor {self.text!r} some labels of this scale are several tokens; "
                "what asked for their tokens knows labels of one token only"
            )
        return tuple(label[0] for label in self.labels)


@dataclass(frozen=True)
class BoundScale:
    """A scale bound to one tokenizer and an ordered list of anchors; the first that is found counts."""

    scale: ScoreScale
    anchors: tuple[BoundAnchor, ...]

    @property
    def read_token_ids(self) -> list[int]:
        """The tokens whose log-probs an engine must return at every position, each once."""
        return sorted({token for anchor in self.anchors for tokens in anchor.trie.children for token in tokens})

    @property
    def extra_tokens(self) -> int:
        """How far a label written by force may reach beyond the longest response: 0 for labels of one token."""
        return max(len(label) for anchor in self.anchors for label in anchor.labels) - 1


def bind_scale(scale: ScoreScale, tokenizer: Tokenizer, anchors: Sequence[str] = (DEFAULT_ANCHOR,)) -> BoundScale:
    """Find each label's tokens as they stand right behind each anchor (" 4" and "4" differ).

    Raises ScaleError, with the tokens shown, when two labels have the same tokens or one has none,
    and when the labels split into tokens in another way after one anchor than after another.
    """
    if not anchors:
        raise ScaleError("at least one answer anchor is needed")
    bound = [_bind_anchor(scale, tokenizer, anchor) for anchor in anchors]
    for other in bound[1:]:
        # One trie serves a whole batch, whatever anchors its rollouts wrote.
        if not other.trie.shape.same_shape(bound[0].trie.shape):
            raise ScaleError(
                f"the labels split into tokens in another way after the anchor {other.text!r} "
                f"({_shown(scale, tokenizer, other.labels)}) than after {bound[0].text!r} "
                f"({_shown(scale, tokenizer, bound[0].labels)}); choose anchors that end alike"
            )
    return BoundScale(scale, tuple(bound))


def _bind_anchor(scale: ScoreScale, tokenizer: Tokenizer, anchor: str) -> BoundAnchor:
    if not anchor.strip():
        raise ScaleError(f"the answer anchor {anchor!r} is blank")
    encoded = [tokenizer.encode(anchor + label, add_special_tokens=False) for label in scale.labels]
    common = 0
    while all(len(ids) > common + 1 for ids in encoded) and len({ids[common] for ids in encoded}) == 1:
        common += 1
    # Labels that begin alike ("10", "11") share tokens that are not the anchor's.
    shared = next((n for n in range(common, 0, -1) if _reads(decode(tokenizer, encoded[0][:n]), anchor)), common)
    labels = tuple(tuple(ids[shared:]) for ids in encoded)
    if not all(labels) or len(set(labels)) != len(labels):
        raise ScaleError(
            f"after the anchor {anchor!r} every label must have tokens that no other label has, but this tokenizer "
            f"gives {_shown(scale, tokenizer, labels)}. Choose other labels (for example digits) or another anchor."
        )
    prefix = decode(tokenizer, encoded[0][:shared])
    if not _reads(prefix, anchor):
        raise ScaleError(
            f"the tokens of the anchor {anchor!r} read {prefix!r} once a label follows; choose an anchor that this "
            "tokenizer keeps (no leading space, plain characters)"
        )
    for label, tokens, ids in zip(scale.labels, labels, encoded):
        written = decode(tokenizer, ids)[len(prefix) :].strip()
        if written != label:
            raise ScaleError(
                f"after the anchor {anchor!r} the label {label!r} becomes the token ids {list(tokens)}, which read "
                f"{written!r}: the tokenizer does not know the label; choose other labels"
            )
    return BoundAnchor(text=anchor, prefix=prefix, labels=labels)


def _shown(scale: ScoreScale, tokenizer: Tokenizer, labels: Sequence[Sequence[int]]) -> str:
    return ", ".join(
        f"{label!r} -> {[decode(tokenizer, [i]) for i in tokens]} (ids {list(tokens)})"
        for label, tokens in zip(scale.labels, labels)
    )


def _reads(prefix: str, anchor: str) -> bool:
    """The prefix is the anchor, but perhaps for space at its end."""
    return prefix.rstrip() == anchor.rstrip() and anchor.startswith(prefix)
