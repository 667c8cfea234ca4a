"""The benchmarks in Prometheus's form: `instruction` is the whole prompt, `gpt4_score` one or several scores.

FLASK, Vicuna Bench, MT Bench and (in the paper's evaluation) Feedback Bench share it. The label is the mean of the
scores. If a label is a mean of several judgements, none of their texts fits it, so no feedback is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from real_openrlhf.data.builders.base import Item, Options, Parts, group_of, mean_label, question_of, text
from real_openrlhf.data.judge_prompt import Rubric

SCORES = "gpt4_score"
_ASKED = (
    r"###\s*The instruction to evaluate:\n(?P<instruction>.*?)\n\n###\s*Response to evaluate:\n(?P<response>.*)\n\n"
)
_REFERENCE = r"###\s*Reference Answer(?: \(Score 5\))?:\n(?P<reference>.*)\n\n"
_RUBRIC = r"###\s*Score Rubrics?:\n\[(?P<criteria>.*?)\]\n(?P<scores>Score \d+:.*)\n\n###\s*Feedback:\s*$"
# Greedy: the last headings are the prompt's own, earlier ones may be part of the response. The form with a reference is
# tried first, else the reference would count as part of the response.
_FORMS = tuple(re.compile(form, re.DOTALL) for form in (_ASKED + _REFERENCE + _RUBRIC, _ASKED + _RUBRIC))
_SCORE = re.compile(r"^Score (\d+): ?(.*?)(?=\nScore \d+:|\Z)", re.DOTALL | re.MULTILINE)


def parts_of(prompt: str) -> Parts | None:
    """The parts of a Prometheus prompt; None when it has another form."""
    match = next(filter(None, (form.search(prompt) for form in _FORMS)), None)
    if match is None or not match["criteria"].strip():
        return None
    descriptions = {score: words for score, words in _SCORE.findall(match["scores"]) if words.strip()}
    return Parts(
        instruction=match["instruction"],
        response=match["response"],
        reference=match.groupdict().get("reference"),
        rubric=Rubric(criteria=match["criteria"], descriptions=descriptions),
    )


def asked(prompt: object) -> str:
    """The question in a whole prompt (text or chat messages): found by Prometheus's headings, else the user's first
    turn, else the whole prompt."""
    if isinstance(prompt, list) and prompt and all(isinstance(message, Mapping) for message in prompt):
        said = [str(message.get("content")) for message in prompt if message.get("role") == "user"]
        prompt = next((text for text in said if parts_of(text)), said[0] if said else prompt)
    parts = parts_of(prompt) if isinstance(prompt, str) else None
    return question_of(parts.instruction if parts else str(prompt))


def reader(name: str) -> Callable[[Mapping[str, Any], Options], Item]:
    """Reads rows of the benchmark with that name."""

    def read(values: Mapping[str, Any], options: Options) -> Item:
        prompt = text(values, "instruction")
        score, n = mean_label(values, options.label_key or SCORES, options.scale)
        parts = parts_of(prompt)
        meta = {
            key: value
            for key, value in values.items()
            if key not in ("instruction", "gpt4_feedback") and isinstance(value, (str, int, float, list))
        }
        number = values.get("idx")
        # The question's text, not its number: two files may use the same numbers, and a question may have two numbers.
        group = (
            group_of(question_of(parts.instruction)) if parts else group_of(prompt) if number is None else str(number)
        )
        return Item(label=score, n=n, group=f"{name}:{group}", whole=prompt, parts=parts, meta=meta)

    return read
