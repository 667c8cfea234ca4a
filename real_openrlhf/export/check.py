"""Checks that an exported folder is complete."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from real_openrlhf.export.settings import ExportError, read_json


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """n_parameters: how many numbers are stored. dtypes: safetensors' names -> number of tensors."""

    n_tensors: int
    n_parameters: int
    n_shards: int
    dtypes: dict[str, int]


def check_export(folder: str | Path, *, finite: bool = True) -> ExportReport:
    """Check that `transformers` can load the folder: config, tokenizer, every shard, every name and shape.

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
        # transformers would load a stray model.safetensors instead of the files in the index.
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
        raise ExportError(f"{path} cannot be read, perhaps it was copied only in part: {error}") from error


def _check_loadable(folder: Path) -> None:
    """Config, tokenizer, and the names and shapes of the weights, as transformers sees them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ExportError(f"{folder}: the tokenizer does not load: {error}") from error
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
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
    """Inside, transformers shows no load report and no progress bars: the errors here say the same."""
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
