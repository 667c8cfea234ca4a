"""DialSummEval: summaries of dialogues by 14 models, each rated for four aspects by three people.

The form is that of kite99520/DialSummEval's `annotation_campus/human_judgment.jsonl` (README beside it). The turns of a
dialogue stand between "|", and stay so: the character also occurs within turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import Builder, Item, Options, Parts, group_of, mean, text
from real_openrlhf.data.builders.summary_aspects import RUBRICS, SCALE, rated


def read(values: Mapping[str, Any], options: Options) -> list[Item]:
    """One item per aspect."""
    dialogue, summary = text(values, "dialogue"), text(values, "summary", blank=True)
    meta = {key: values[key] for key in ("id", "model_id") if key in values}
    column = options.label_key or "annotations"
    return [
        Item(
            id="/".join([*map(str, meta.values()), aspect]),
            label=mean(found),
            n=len(found),
            ratings=found,
            aspect=aspect,
            group=f"dialsummeval:{group_of(dialogue)}",
            parts=Parts(
                instruction=f"Summarize this dialogue, whose turns stand between vertical bars.\n\n{dialogue}",
                response=summary,
                rubric=RUBRICS[aspect],
            ),
            meta=meta,
        )
        for aspect, found in rated(values, column, options.aspects, options.scale).items()
    ]


BUILDER = Builder(
    name="dialsummeval",
    about="DialSummEval: 1,400 summaries of dialogues, four aspects, three raters each",
    read=read,
    scale=SCALE,
    template="paper",
    aspects=dict.fromkeys(RUBRICS, SCALE),
)
