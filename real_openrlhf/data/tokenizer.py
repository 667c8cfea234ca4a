"""The model's tokenizer and the tokens that end its responses: the same for data, engines and export."""

from __future__ import annotations

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, name: str = "--actor.model_name_or_path"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or ValueError that says what is missing. name: of the setting, for the message."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} {path!r} has no tokenizer that loads: {error}") from error


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
