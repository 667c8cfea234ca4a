"""SummEval: summaries of news by 16 models, each rated for four aspects by three experts and five crowd workers.

The form is that of Yale-LILY/SummEval's `model_annotations.aligned.jsonl` (README, section "Human annotations"), after
its `data_processing/pair_data.py` has put the articles in as the column `text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from real_openrlhf.data.builders.base import Builder, FieldError, Item, Options, Parts, group_of, mean, text
from real_openrlhf.data.builders.summary_aspects import RUBRICS, SCALE, rated

EXPERTS = "expert_annotations"


def read(values: Mapping[str, Any], options: Options) -> list[Item]:
    """One item per aspect. The raters are the experts unless --label_key says turker_annotations."""
    if "text" not in values:
        raise FieldError(
            "text",
            "the article that is summarized is missing: the published file has only its path. Download the CNN and "
            "DailyMail stories and run SummEval's data_processing/pair_data.py --data_annotations FILE --story_files "
            "FOLDER, which writes model_annotations.aligned.paired.jsonl with it",
        )
    article, summary = text(values, "text"), text(values, "decoded", blank=True)
    column = options.label_key or EXPERTS
    meta = {key: values[key] for key in ("id", "model_id", "filepath") if key in values}
    return [
        Item(
            id="/".join([*(str(meta[key]) for key in ("id", "model_id") if key in meta), aspect]),
            label=mean(found),
            n=len(found),
            ratings=found,
            aspect=aspect,
            group=f"summeval:{group_of(article)}",
            parts=Parts(instruction=f"Summarize this article.\n\n{article}", response=summary, rubric=RUBRICS[aspect]),
            meta={**meta, "rated_by": column},
        )
        for aspect, found in rated(values, column, options.aspects, options.scale).items()
    ]


BUILDER = Builder(
    name="summeval",
    about="SummEval: 1,600 summaries of news, four aspects, three experts each (--label_key turker_annotations: five "
    "crowd workers)",
    read=read,
    scale=SCALE,
    template="paper",
    aspects=dict.fromkeys(RUBRICS, SCALE),
)
