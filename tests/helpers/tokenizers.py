"""Small tokenizers made on the spot, without any download."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>")
TEXT = "So the overall score is 0 1 2 3 4 5 6 7 8 9 a b c good bad text rate this answer : ."
WORDS = tuple(TEXT.split())
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }} {{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(
    extra_words: Iterable[str] = (),
    chat_template: str | None = None,
    *,
    add_bos: bool = False,
    add_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """One token per word, split at spaces and punctuation; unknown words become <unk>.

    Decoding joins words with one space. add_bos, add_eos: what encode(add_special_tokens=True) adds. pad, bos and eos
    are distinct.
    """
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIALS, *WORDS, *extra_words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if add_bos or add_eos:
        single = ("<bos> " if add_bos else "") + "$A" + (" <eos>" if add_eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )
    result.chat_template = chat_template
    return result
