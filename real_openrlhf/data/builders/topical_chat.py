"""Topical-Chat with USR's ratings: answers of six systems in conversations about a fact, three raters each.

The form is that of USR's `tc_usr_data.json`, a list of {context, fact, annotators, responses}, of which
SmartDataAnalytics/proxy_indicators has a copy (`data/usr_topical_chat.json`) and which dmg-illc/JUDGE-BENCH reads
(`data/topical_chat/convert_topical_chat.py`); PersonaChat's is alike. Each of the responses has a list of scores per
aspect, in the order of the annotators. The aspects have three scales, and a data set has one: Overall is built unless
--aspect, or --scale 1-3 or 0-1, chooses others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import (
    Builder,
    FieldError,
    Item,
    Options,
    Parts,
    get,
    group_of,
    listed_ratings,
    mean,
    optional_text,
    text,
)
from real_openrlhf.data.judge_prompt import Rubric
from real_openrlhf.data.row import shorten

ASPECTS = {
    "Overall": "1-5",
    "Natural": "1-3",
    "Maintains Context": "1-3",
    "Engaging": "1-3",
    "Understandable": "0-1",
    "Uses Knowledge": "0-1",
}
NO_FACT = "_nofact"
RUBRICS = {
    "Overall": Rubric(
        criteria="How good is the response on the whole?",
        descriptions={
            "1": "Very bad: the conversation could hardly go on from it.",
            "2": "Bad: valid, and poor otherwise.",
            "3": "Neither good nor bad.",
            "4": "Good, with one flaw that keeps it from being very good.",
            "5": "Very good, without a flaw that matters.",
        },
    ),
    "Natural": Rubric(
        criteria="Is the response something that a person would say?",
        descriptions={"1": "Unnatural.", "2": "Odd, and not quite unnatural.", "3": "Natural."},
    ),
    "Maintains Context": Rubric(
        criteria="Does the response carry on the conversation?",
        descriptions={
            "1": "It ignores what was said or changes the topic abruptly.",
            "2": "It refers to what was said in a general way.",
            "3": "It is on topic and takes up what was said.",
        },
    ),
    "Engaging": Rubric(
        criteria="Is the response interesting?",
        descriptions={"1": "Dull.", "2": "Somewhat interesting.", "3": "Very interesting."},
    ),
    "Understandable": Rubric(
        criteria="Can the response be understood, given what was said before?",
        descriptions={"0": "No.", "1": "Yes."},
    ),
    "Uses Knowledge": Rubric(
        criteria="Does the response make use of the fact?",
        descriptions={"0": "No.", "1": "Yes."},
    ),
}


def read(values: Mapping[str, Any], options: Options) -> list[Item]:
    """One item per response and aspect."""
    context, fact, responses = text(values, "context"), optional_text(values, "fact"), get(values, "responses")
    raters = _raters(values)
    if not isinstance(responses, list) or not responses or not all(isinstance(one, Mapping) for one in responses):
        raise FieldError("responses", f"expected a list of objects, got {shorten(responses)}")
    told = "" if fact is None or fact.strip() == NO_FACT else f"\n\nA fact that the response may use: {fact.strip()}"
    instruction = f"Say what comes next in this conversation.\n\n{context.strip()}{told}"
    items = []
    for number, response in enumerate(responses):
        try:
            items += _rated(response, raters, instruction, f"topical_chat:{group_of(context)}", options)
        except FieldError as error:
            raise FieldError(f"responses.{number}.{error.column}", str(error)) from error
    return items


def _raters(values: Mapping[str, Any]) -> list[str] | None:
    """Not everybody rated every conversation."""
    names = values.get("annotators")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise FieldError("annotators", f"expected a list of different names, got {shorten(names)}")
    return names


def _rated(
    response: Mapping[str, Any], raters: list[str] | None, instruction: str, group: str, options: Options
) -> list[Item]:
    said = text(response, "response", blank=True)
    model = optional_text(response, "model")
    items = []
    for aspect in options.aspects:
        found = listed_ratings(response, aspect, options.scale, raters)
        items.append(
            Item(
                id="/".join(filter(None, (model, aspect))),
                label=mean(found),
                n=len(found),
                ratings=found,
                aspect=aspect,
                group=group,
                parts=Parts(instruction=instruction, response=said, rubric=RUBRICS[aspect]),
                meta={} if model is None else {"model": model},
            )
        )
    return items


BUILDER = Builder(
    name="topical_chat",
    about="Topical-Chat with USR's ratings: 360 answers, three raters each; Overall unless --aspect says otherwise",
    read=read,
    scale="1-5",
    template="rubric",
    aspects=ASPECTS,
)
