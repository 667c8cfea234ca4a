"""How well a model's judgements agree with the labels, by transformers alone on a CPU.

    python -m examples.judging_task.measure --model runs/judging_task/start --data runs/judging_task/data \
        --splits valid test_id --output runs/judging_task/start.json

Every prompt gets a judgement in each of these ways:

    sampled  feedback and score at temperature 1
    greedy   the likeliest token at every place
    careful  E[score] after the feedback that the careful annotator would write: what it would score if it read well
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples.judging_task.annotators import ANCHOR
from examples.judging_task.items import LABELS
from examples.judging_task.task import TESTS, count
from real_openrlhf.algo.bound_scale import bind_scale
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.evals.intervals import bootstrap

Row = dict[str, Any]
SPLITS = ("valid", *TESTS)
WAYS = ("sampled", "greedy", "careful")
# A line of feedback is three tokens, the score two, the end of text one.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """text: the response without the end of text; decoded, expected: the written score and E[score], None without one;
    mass: probability of the scale at the score position."""

    text: str
    decoded: float | None
    expected: float | None
    mass: float | None


class Measurer:
    """A model with its tokenizer."""

    def __init__(self, model: str, *, batch_size: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
        scale = bind_scale(ScoreScale.parse(f"{LABELS[0]}-{LABELS[-1]}"), self.tokenizer, [ANCHOR])
        self.score_ids = torch.tensor(scale.anchors[0].token_ids)
        self.end = self.tokenizer.eos_token_id
        self.reader = ScoreReader.build(scale, self.tokenizer, [self.end])
        self.batch_size = batch_size

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], *, sample: bool, seed: int) -> list[list[int]]:
        """Token ids of one response per prompt, up to the end of text, in order."""
        torch.manual_seed(seed)
        found: list[list[int]] = []
        config = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=sample,
            # Off, or transformers samples from the 50 likeliest tokens.
            top_k=0 if sample else None,
            eos_token_id=self.end,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        for start in range(0, len(prompts), self.batch_size):
            batch = self.tokenizer(list(prompts[start : start + self.batch_size]), return_tensors="pt", padding=True)
            out = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
            )
            for ids in out[:, batch["input_ids"].shape[1] :].tolist():
                found.append(ids[: ids.index(self.end) + 1] if self.end in ids else ids)
        return found

    @torch.inference_mode()
    def read(self, prompts: Sequence[str], responses: Sequence[Sequence[int]]) -> list[Judgement]:
        """E[score] at the score position of each response, from a forward pass over prompt and response."""
        judged: list[Judgement] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            heads = [self.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts[part]]
            rows = [[*head, *response] for head, response in zip(heads, responses[part])]
            logits = self.model(**self._padded(rows)).logits
            for head, response, row in zip(heads, responses[part], logits):
                judged.append(self._judgement(response, row[len(head) - 1 :]))
        return judged

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def _judgement(self, response: Sequence[int], logits: Tensor) -> Judgement:
        """logits: [response + 1, V]; row t predicts the response's token t."""
        reading = self.reader.read(response)
        text = self.tokenizer.decode(response, skip_special_tokens=True)
        if reading.position is None:
            return Judgement(text=text, decoded=None, expected=None, mass=None)
        probs = logits[reading.position].double().softmax(-1)[self.score_ids]
        return Judgement(
            text=text,
            decoded=None if reading.label_index is None else float(LABELS[reading.label_index]),
            expected=float(probs @ torch.tensor(LABELS, dtype=torch.float64)),
            mass=float(probs.sum()),
        )


def coverage(row: Row, text: str) -> float:
    """Share of the response's lines that the feedback names by their number."""
    return len(set(row["tags"]) & set(text.split())) / len(row["tags"])


def last_tally(text: str) -> int | None:
    """The tally that the feedback arrives at, None without one."""
    found = re.findall(r"(?<!\S)[+-]\d+(?!\S)", text)
    return int(found[-1]) if found else None


def correlation(scores: Sequence[float | None], labels: Sequence[float], seed: int) -> dict[str, float | None]:
    """Pearson's r with its 95% interval over the rows; rows without a score are left out."""
    interval = bootstrap("pearson", scores, labels, seed=seed)
    return {"pearson": interval.estimate, "low": interval.low, "high": interval.high}


def summary(rows: Sequence[Row], judged: Sequence[Judgement], *, seed: int) -> dict[str, Any]:
    """
    decoded, expected  agreement of the written score and of E[score] with the labels
    unscored           share of rows without a written score
    mass               mean probability of the scale, over rows with a score position
    coverage           mean share of lines that the feedback names
    tally_right        share of feedback that arrives at the right tally
    """
    labels = [float(row["label"]) for row in rows]
    decoded, expected = [j.decoded for j in judged], [j.expected for j in judged]
    masses = [j.mass for j in judged if j.mass is not None]
    return {
        "decoded": correlation(decoded, labels, seed),
        "expected": correlation(expected, labels, seed),
        "unscored": decoded.count(None) / len(rows),
        "mass": sum(masses) / len(masses) if masses else None,
        "coverage": sum(coverage(row, j.text) for row, j in zip(rows, judged)) / len(rows),
        "tally_right": sum(last_tally(j.text) == row["tally"] for row, j in zip(rows, judged)) / len(rows),
        "n": len(rows),
        "first": judged[0].text,
    }


def measure(measurer: Measurer, rows: Sequence[Row], ways: Sequence[str], *, seed: int) -> dict[str, Any]:
    """One split, in each of the ways (see WAYS)."""
    prompts = [row["prompt"] for row in rows]
    found: dict[str, Any] = {}
    for way in ways:
        if way != "careful":
            responses = measurer.generate(prompts, sample=way == "sampled", seed=seed)
            found[way] = summary(rows, measurer.read(prompts, responses), seed=seed)
            continue
        texts = [f"{row['careful_feedback']} {ANCHOR}{row['label']}" for row in rows]
        # The label comes after the position that is read: the model does not see it, and it is no score of the model's.
        whole = summary(rows, measurer.read(prompts, [measurer.tokenizer.encode(text) for text in texts]), seed=seed)
        found[way] = {name: whole[name] for name in ("expected", "mass", "n")}
    return found


def read_rows(path: Path, limit: int | None) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"--data: there is no {path}; python -m examples.judging_task.task writes it")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description="Correlations of a model's judgements.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that task.py wrote")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, metavar="SPLIT", help=", ".join(SPLITS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the intervals")
    parser.add_argument("--batch_size", type=count, default=250)
    parser.add_argument("--max_samples", type=count, help="use the first rows only; rows of a file are in random order")
    args = parser.parse_args()
    try:
        files = {split: read_rows(args.data / f"{split}.jsonl", args.max_samples) for split in args.splits}
        measurer = Measurer(args.model, batch_size=args.batch_size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = {split: measure(measurer, rows, args.ways, seed=args.seed) for split, rows in files.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for split, ways in found.items():
        cells = (f"{way} {values['expected']['pearson']}" for way, values in ways.items())
        print(f"{split}: Pearson of E[score], {', '.join(cells)}")


if __name__ == "__main__":
    main()
