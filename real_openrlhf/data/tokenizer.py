"""Loads the model's tokenizer and the tokens that end its responses, in the same way for data, engines and export."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from real_openrlhf.common.errors import one_line
from real_openrlhf.common.model_name import check_folder

# Words without punctuation, around which a tokenizer may put spaces. The line break must separate words too.
_PROBE = "Rate this answer from 1 to 5\nand end with the score 4"


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, name: str = "--actor.model_name_or_path"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer. name: of the setting, for messages.

    ValueError if it cannot be loaded, and if decoding does not give the text back: prompts would silently lose words.
    """
    check_folder(path, name, needs_config=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and huggingface_hub raise many kinds
        raise ValueError(f"{name} {path!r}: the tokenizer does not load: {one_line(error)}") from error
    lost = what_is_lost(tokenizer)
    if lost is not None:
        raise ValueError(
            f"{name} {path!r}: the tokenizer ({type(tokenizer).__name__}) does not give its text back: {lost}; "
            f"{_remedy(path)}"
        )
    return tokenizer


def what_is_lost(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a short text loses by encoding and decoding, in words; None if the tokenizer can be used.

    Kind and number of spaces may change, upper and lower case too, and unknown characters may be replaced. But each
    word must still be there, and separate from its neighbours.
    """
    ids = list(tokenizer.encode(_PROBE, add_special_tokens=False))
    if ids and set(ids) <= {tokenizer.unk_token_id}:
        return None  # a small vocabulary of other words
    back = tokenizer.decode(ids)
    unknown = (tokenizer.unk_token or "").casefold()
    got, words = back.casefold().split(), _PROBE.casefold().split()
    said = f"{_PROBE!r} comes back as {back!r}"
    if len(got) < len(words):
        # If the vocabulary has no line break, the text shows an unknown token there, so the loss is visible.
        unknown_break = len(got) == len(words) - 1 and unknown and unknown in back.casefold() and "\n" not in back
        return None if unknown_break else f"spaces get lost, {said}"
    if len(got) > len(words) or any(g != w and not (unknown and unknown in g) for g, w in zip(got, words)):
        return f"words change, {said}"
    return None


def _remedy(path: str) -> str:
    """What the user can do. Most often tokenizer.json is right, but the class name in the other file is wrong."""
    if (Path(path) / "tokenizer.json").is_file():
        try:
            plain = PreTrainedTokenizerFast.from_pretrained(path)
        except (OSError, ValueError):
            plain = None
        if plain is not None and what_is_lost(plain) is None:
            return (
                "its tokenizer.json is right, but is not of that class: write "
                '"tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json'
            )
    return "use the tokenizer files that the model was published with"


def end_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a response: the tokenizer's, and those of the generation config if there is one."""
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        named = None
    ids.update([named] if isinstance(named, int) else (named or []))
    if not ids:
        raise ValueError(f"{path!r}: neither the tokenizer nor the generation config names an end-of-text token")
    return frozenset(ids)
