"""A score scale bound to a tokenizer: each label's tokens after the answer anchor (the text right before the score)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from real_openrlhf.algo.label_trie import TokenTrie
from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScaleError, ScoreScale


class Tokenizer(Protocol):
    """The two methods of a tokenizer that are used here; every Hugging Face tokenizer has them."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str: ...


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of the ids as they are: special tokens kept, spaces not cleaned up."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class BoundAnchor:
    """An anchor, and the tokens of the scale's labels after it.

    text    the anchor as configured
    prefix  the text of the tokens before the score: the anchor without the final space, if the
            tokenizer merges that into the score's first token (" 4")
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
        """[S] the labels' tokens, if each label is one token; ScaleError if one has several."""
        if not self.trie.is_flat:
            raise ScaleError(
                f"after the anchor {self.text!r} some labels of this scale are several tokens; "
                "here every label must be one token"
            )
        return tuple(label[0] for label in self.labels)


@dataclass(frozen=True)
class BoundScale:
    """A scale bound to one tokenizer and an ordered list of anchors: the first that a response contains counts."""

    scale: ScoreScale
    anchors: tuple[BoundAnchor, ...]

    @property
    def read_token_ids(self) -> list[int]:
        """The tokens whose log-probs an engine must return at every position, each once."""
        return sorted({token for anchor in self.anchors for tokens in anchor.trie.children for token in tokens})

    @property
    def extra_tokens(self) -> int:
        """By how many tokens a forced label may exceed the longest response: 0 for labels of one token."""
        return max(len(label) for anchor in self.anchors for label in anchor.labels) - 1


def bind_scale(scale: ScoreScale, tokenizer: Tokenizer, anchors: Sequence[str] = (DEFAULT_ANCHOR,)) -> BoundScale:
    """Find each label's tokens right after each anchor (" 4" and "4" differ).

    Raises ScaleError, which shows the tokens, when two labels have the same tokens or one has none,
    and when the labels split into tokens differently after different anchors.
    """
    if not anchors:
        raise ScaleError("at least one answer anchor is needed")
    bound = [_bind_anchor(scale, tokenizer, anchor) for anchor in anchors]
    for other in bound[1:]:
        # A batch has one trie, and its rollouts may have written different anchors.
        if not other.trie.shape.same_shape(bound[0].trie.shape):
            raise ScaleError(
                f"the labels split into tokens differently after the anchor {other.text!r} "
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
    # Labels with the same beginning ("10", "11") share tokens that do not belong to the anchor.
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
    """The prefix is the anchor, possibly without space at its end."""
    return prefix.rstrip() == anchor.rstrip() and anchor.startswith(prefix)
