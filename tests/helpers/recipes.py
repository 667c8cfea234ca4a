"""The recipes of examples/: what each trains, on which GPUs, and how its plan is made without the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_openrlhf.run.forecast import Forecast
from real_openrlhf.run.memory import host_bytes
from tests.helpers.configs import MISTRAL_7B, QWEN3_1_7B, QWEN3_4B, QWEN3_8B, QWEN3_32B, write_config
from tests.helpers.tiny_judge import make_tokenizer, write_rows

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """parameters: as the model's publisher counts them. nodes, per_node: of GPUs."""

    folder: str
    config: str
    family: str
    sizes: dict[str, Any]
    parameters: int
    nodes: int = 1
    per_node: int = 8
    gpus: str = "8xA100-80GB"

    def __str__(self) -> str:
        return f"{self.folder}/{self.config}"

    @property
    def path(self) -> Path:
        return ROOT / "examples" / self.folder

    def flags(self) -> list[str]:
        return ["--config", str(self.path / f"{self.config}.yaml")]

    def model(self, folder: Path) -> str:
        """A folder with the model's configuration, and a small tokenizer with a chat template."""
        tokenizer = make_tokenizer()
        tokenizer.model_max_length = 4096
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(folder)
        return write_config(folder, self.family, **self.sizes)


_QWEN32 = dict(
    folder="qwen3_32b",
    family="qwen3",
    sizes=QWEN3_32B,
    parameters=32_762_123_264,
    nodes=2,
    gpus="2x8xA100-80GB",
)
RECIPES: tuple[Recipe, ...] = (
    Recipe(folder="mistral_7b", config="config", family="mistral", sizes=MISTRAL_7B, parameters=7_241_732_096),
    Recipe(folder="qwen3_8b", config="config", family="qwen3", sizes=QWEN3_8B, parameters=8_190_735_360),
    Recipe(config="colocated", **_QWEN32),
    Recipe(config="separate", **_QWEN32),
    Recipe(
        folder="one_24gb_gpu",
        config="config",
        family="qwen3",
        sizes=QWEN3_1_7B,
        parameters=1_720_574_976,
        per_node=1,
        gpus="1xL4-24GB",
    ),
    Recipe(
        folder="one_80gb_gpu",
        config="config",
        family="qwen3",
        sizes=QWEN3_4B,
        parameters=4_022_468_096,
        per_node=1,
        gpus="1xA100-80GB",
    ),
)


def data_flags(folder: Path, *, prompts: int = 256, tokens: int = 2048) -> list[str]:
    """Prompts of so many tokens each, for training and for evaluation."""
    text = " ".join(["fine"] * (tokens - 1) + ["judge"])
    rows: Sequence[dict[str, object]] = [{"prompt": text, "label": 1 + i % 5} for i in range(prompts)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[:5])
    # The small tokenizer knows one anchor.
    return [
        *("--data.prompt_dataset", str(folder / "train.jsonl"), "--eval.dataset", str(folder / "test.jsonl")),
        *("--real.anchor", "score ", "--dry_run"),
    ]


def plan_table(forecast: Forecast) -> str:
    """The fullest phase of each kind of GPU, the memory of a node and the seconds of a step, as READMEs have them."""
    memory, time = forecast.memory, forecast.time
    assert time is not None
    lines = [f"| GPUs | fullest phase | GB of {memory.card / 1e9:g} |", "|---|---|---|"]
    lines += [
        f"| {place.name}, {place.gpus} | {place.fullest.name} | {place.fullest.total / 1e9:.1f} |"
        for place in memory.places
    ]
    host = ", ".join(f"{term.name} {term.bytes / 1e9:.1f}" for term in memory.host)
    seconds = ", ".join(f"{phase.name} {phase.seconds:.0f}" for phase in time.phases if phase.seconds >= 0.5)
    lines += ["", f"CPU memory of a policy node: {host_bytes(memory.host) / 1e9:.1f} GB ({host})."]
    return "\n".join([*lines, f"A step: {time.step:.0f} s ({seconds})."])
