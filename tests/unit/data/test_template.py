"""From raw prompts to token ids."""

from __future__ import annotations

import logging

import pytest

from real_openrlhf.data.template import PromptError, PromptTemplate, TemplateError
from tests.helpers.tokenizers import CHAT_TEMPLATE, word_tokenizer

USER = {"role": "user", "content": "rate this"}


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize(
    ("bos", "eos", "text", "expected"),
    [
        (False, False, "rate this", "rate this"),
        (True, False, "rate this", "<bos> rate this"),
        (True, True, "rate this", "<bos> rate this"),
        (False, True, "rate this", "rate this"),
        (True, True, "<bos> rate this", "<bos> rate this"),
        (True, True, "rate this <eos>", "<bos> rate this <eos>"),
        (False, False, "<bos> rate this <eos>", "<bos> rate this <eos>"),
        (True, False, "<bos> <bos> rate", "<bos> <bos> <bos> rate"),
    ],
)
def test_plain_text_gets_bos_once_and_no_added_eos(bos, eos, text, expected):
    tokenizer = word_tokenizer(add_bos=bos, add_eos=eos)
    got, ids = PromptTemplate().render(tokenizer, text)
    assert got == text
    assert words(tokenizer, ids) == expected.split()


def test_input_template_is_filled_without_touching_other_braces():
    tokenizer = word_tokenizer()
    text, ids = PromptTemplate(input_template="text : {} . {answer}").render(tokenizer, "a {b} {}")
    assert text == "text : a {b} {} . {answer}"
    assert words(tokenizer, ids)[:3] == ["text", ":", "a"]


@pytest.mark.parametrize("raw", ["rate this", [USER]])
def test_chat_template_adds_the_generation_prompt_and_bos_once(raw):
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE, add_bos=True, add_eos=True)
    text, ids = PromptTemplate(apply_chat_template=True).render(tokenizer, raw)
    assert text == "<bos><user> rate this <eos><assistant>"
    assert words(tokenizer, ids) == ["<bos>", "<user>", "rate", "this", "<eos>", "<assistant>"]


def test_input_template_wraps_the_user_message():
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    template = PromptTemplate(apply_chat_template=True, input_template="text : {}")
    assert template.render(tokenizer, "a b")[0] == "<bos><user> text : a b <eos><assistant>"


@pytest.mark.parametrize(("thinking", "expected"), [(None, "unset"), (True, "True"), (False, "False")])
def test_enable_thinking_reaches_the_chat_template_only_when_set(thinking, expected):
    chat = "{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}unset{% endif %}"
    template = PromptTemplate(apply_chat_template=True, enable_thinking=thinking)
    assert template.render(word_tokenizer(chat_template=chat), "a")[0] == expected


@pytest.mark.parametrize("text", ["no slot", "{} and {}", ""])
def test_input_template_needs_one_slot(text):
    with pytest.raises(TemplateError, match=r"--data.input_template must contain exactly one '\{\}'"):
        PromptTemplate(input_template=text)


def test_thinking_without_a_chat_template_is_a_contradiction():
    with pytest.raises(TemplateError, match=r"--data.apply_chat_template"):
        PromptTemplate(enable_thinking=False)


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(TemplateError, match="the tokenizer has no chat template"):
        PromptTemplate(apply_chat_template=True).render(word_tokenizer(), "a")


def test_an_escaped_line_break_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        PromptTemplate(input_template="a\n{}")
        assert not caplog.records
        PromptTemplate(input_template="a\\n{}")
    assert "not a line break" in caplog.text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        (None, "not null None"),
        (5, "not int 5"),
        ({"role": "user", "content": "a"}, "not dict"),
        (b"a", "not bytes"),
        ([], "list of chat messages is empty"),
        (["a"], "message 0 is str"),
        ([USER, {"role": "user"}], "message 1 needs a text 'content', but has None"),
        ([{"content": "a"}], "message 0 needs a text 'role'"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "needs a text 'content'"),
        ([USER, {"role": "assistant", "content": "4"}], "the last message is the assistant's"),
        ([{"role": "user", "content": " "}], "the prompt is empty"),
    ],
)
def test_bad_prompts(raw, message):
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    with pytest.raises(PromptError, match=message):
        PromptTemplate(apply_chat_template=True).render(tokenizer, raw)


def test_messages_need_the_flag_and_no_input_template():
    with pytest.raises(PromptError, match=r"pass --data.apply_chat_template"):
        PromptTemplate().render(word_tokenizer(), [USER])
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    with pytest.raises(PromptError, match=r"--data.input_template cannot wrap"):
        PromptTemplate(apply_chat_template=True, input_template="{}").render(tokenizer, [USER])


@pytest.mark.parametrize(
    "chat", ["{{ raise_exception('no system message') }}", "{{ messages[0].nothing.there }}", "{% broken"]
)
def test_a_chat_template_that_refuses(chat):
    with pytest.raises(PromptError, match="chat template refuses"):
        PromptTemplate(apply_chat_template=True).render(word_tokenizer(chat_template=chat), [USER])


def test_a_prompt_without_tokens():
    with pytest.raises(PromptError, match="makes no token"):
        PromptTemplate(apply_chat_template=True).render(word_tokenizer(chat_template=" "), "a")


def test_sha256_tells_templates_apart():
    templates = [
        PromptTemplate(),
        PromptTemplate(input_template="{}"),
        PromptTemplate(apply_chat_template=True),
        PromptTemplate(apply_chat_template=True, enable_thinking=False),
        PromptTemplate(apply_chat_template=True, enable_thinking=True),
    ]
    assert len({t.sha256 for t in templates}) == 5
    assert PromptTemplate(input_template="{}").sha256 == templates[1].sha256
