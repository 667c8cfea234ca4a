"""The quickstart's supervised warm-up: cross-entropy on given judgements, without Ray, DeepSpeed or vLLM.

`real_openrlhf.train_warmup` is the one to use; the results beside this file were made from starts of this one.

    python examples/quickstart/warmup.py --model_name_or_path DIR --data sft.jsonl --output_dir OUT --max_steps 800

The data have the columns `prompt` and `response`. Only the response and the end of text behind it
are learned. One process, fp32, CPU or one GPU; metrics go to OUT/warmup_metrics.jsonl.
"""

from __future__ import annotations

# Before torch, whose OpenMP reads it once.
import real_openrlhf.common.quiet_threads  # noqa: F401

# isort: split
import argparse
import json
import logging
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from real_openrlhf.common.arguments import take_negative_values
from real_openrlhf.common.device import Device
from real_openrlhf.common.folder_lock import FolderLock
from real_openrlhf.common.home import use_writable_caches
from real_openrlhf.common.paths import path_argument, text_argument
from real_openrlhf.data.row import BadRow, DataError, Row, lookup, shorten
from real_openrlhf.data.sources import read_rows
from real_openrlhf.data.template import PromptError, PromptTemplate
from real_openrlhf.data.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

METRICS_FILE = "warmup_metrics.jsonl"
# Batches whose rows are sorted by length together: enough to save padding, few enough to stay random.
_BUCKET = 50


class WarmupError(ValueError):
    """A flag cannot be used, or not with this model and data; the message says which and what would work."""


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """
    batch_size         rows per optimizer step
    micro_batch_size   rows per forward pass; None: the whole batch
    max_steps          optimizer steps; exactly one of this and num_epochs
    num_epochs         passes over the data
    lr_scheduler       "cosine" (down to 0) or "constant", after a linear rise over warmup_steps
    max_norm           gradient clipping
    """

    learning_rate: float = 1e-5
    batch_size: int = 64
    micro_batch_size: int | None = None
    max_steps: int | None = None
    num_epochs: float | None = None
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    max_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    log_steps: int = 10

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise WarmupError("give exactly one of --max_steps and --num_epochs")
        positive = (
            "learning_rate",
            "batch_size",
            "micro_batch_size",
            "max_steps",
            "num_epochs",
            "max_norm",
            "log_steps",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise WarmupError(f"--{name} must be positive and finite, got {value}")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise WarmupError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.lr_scheduler not in ("cosine", "constant"):
            raise WarmupError(f"--lr_scheduler must be cosine or constant, got {self.lr_scheduler!r}")

    def total_steps(self, n_rows: int) -> int:
        """Optimizer steps on n_rows rows; the last, smaller batch of an epoch is dropped."""
        if n_rows < self.batch_size:
            raise WarmupError(f"{n_rows} rows do not fill one batch; lower --batch_size {self.batch_size}")
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return max(1, round(self.num_epochs * (n_rows // self.batch_size)))

    def learning_rate_at(self, step: int, total: int) -> float:
        """Of the step with this number, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_scheduler == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Example:
    """token_ids: prompt, response, end of text. n_prompt: where the response begins."""

    token_ids: tuple[int, ...]
    n_prompt: int

    @property
    def n_learned(self) -> int:
        return len(self.token_ids) - self.n_prompt


def load_examples(source: str, *, tokenizer: Any, template: PromptTemplate, max_len: int) -> list[Example]:
    """Read and tokenise. max_len: tokens of prompt and response; longer rows are an error, nothing is cut.

    Raises DataError with file, row and column at the first row that cannot be used.
    """
    if tokenizer.eos_token_id is None:
        raise WarmupError("the tokenizer has no end of text; name one as eos_token in its tokenizer_config.json")
    if max_len < 2:
        raise WarmupError(f"--max_len must be at least 2, got {max_len}")
    return list(_examples(read_rows(source), tokenizer, template, max_len))


def _examples(
    rows: Iterable[Row | BadRow], tokenizer: Any, template: PromptTemplate, max_len: int
) -> Iterator[Example]:
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(str(row))
        column = "prompt"
        try:
            prompt_ids = template.render(tokenizer, lookup(row.values, column))[1]
            column = "response"
            response_ids = encode_response(tokenizer, lookup(row.values, column))
        except KeyError as error:
            raise DataError(f"{row.place}, column {column!r}: {error.args[0]}") from None
        except PromptError as error:
            raise DataError(f"{row.place}, column {column!r}: {error}") from None
        example = Example((*prompt_ids, *response_ids), len(prompt_ids))
        if len(example.token_ids) > max_len:
            raise DataError(
                f"{row.place}: prompt and response have {len(example.token_ids)} tokens; raise --max_len {max_len} "
                "or shorten the row"
            )
        yield example


def encode_response(tokenizer: Any, response: object) -> list[int]:
    """The response's ids and one end of text.

    It is tokenised by itself, not joined to the prompt's text: in training the model continues the
    prompt's ids, and an id that straddles the two could never be sampled.
    """
    if not isinstance(response, str) or not response.strip():
        raise PromptError(f"a response is text, not {shorten(response)}")
    ids = list(tokenizer.encode(response, add_special_tokens=False))
    end, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    if unknown is not None and unknown != end and unknown in ids:
        raise PromptError(f"the tokenizer has no token for a part of {shorten(response)}")
    return ids if ids[-1:] == [end] else [*ids, end]


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end: every epoch in a new order, rows of similar length together."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        full = len(order) - len(order) % batch_size
        for start in range(0, full, batch_size * _BUCKET):
            # A stable sort: rows of equal length stay shuffled.
            chunk = sorted(order[start : min(full, start + batch_size * _BUCKET)], key=lambda e: len(e.token_ids))
            found = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
            yield from rng.sample(found, len(found))


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """[N, L] int64 right-padded ids and [N, L] bool mask of the tokens to learn."""
    width = max(len(example.token_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    learned = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, example in enumerate(examples):
        ids[i, : len(example.token_ids)] = torch.tensor(example.token_ids)
        learned[i, example.n_prompt : len(example.token_ids)] = True
    return ids, learned


def summed_loss(model: Any, examples: Sequence[Example], *, pad_id: int, device: torch.device) -> Tensor:
    """Cross-entropy summed over the learned tokens, scalar fp32 in nats.

    No attention mask: padding stands on the right, where a causal model never looks.
    """
    ids, learned = (tensor.to(device) for tensor in collate(examples, pad_id))
    first = min(example.n_prompt for example in examples)
    # One row of logits before each token from `first` on; the last row predicts nothing.
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits[:, :-1]
    mask = learned[:, first:]
    return torch.nn.functional.cross_entropy(logits[mask].float(), ids[:, first:][mask], reduction="sum")


def train(
    model: Any, examples: Sequence[Example], config: WarmupConfig, *, pad_id: int, device: torch.device, log_path: Path
) -> list[dict[str, float]]:
    """Train in place; returns what was logged: one row per log_steps, its loss the mean since the row before."""
    total = config.total_steps(len(examples))
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    stream, history = batches(examples, config.batch_size, config.seed), []
    loss, tokens, started = 0.0, 0, time.perf_counter()
    with log_path.open("w", encoding="utf-8") as log, tqdm(total=total, desc="warm-up", unit="step") as bar:
        for step in range(total):
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step, total)
            batch_loss, norm = _update(model, optimizer, batch, config, pad_id=pad_id, device=device)
            loss, tokens = loss + batch_loss, tokens + sum(example.n_learned for example in batch)
            bar.update()
            if (step + 1) % config.log_steps and step + 1 < total:
                continue
            seconds = time.perf_counter() - started
            row = {
                "step": step + 1,
                "loss": loss / tokens,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
            }
            log.write(json.dumps({"phase": "warmup", **row}) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['learning_rate']:.1e}")
            history.append(row)
            loss, tokens, started = 0.0, 0, time.perf_counter()
    return history


def _update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    config: WarmupConfig,
    *,
    pad_id: int,
    device: torch.device,
) -> tuple[float, float]:
    """One optimizer step on the mean over the batch's learned tokens; returns the summed loss and the gradient norm."""
    size = config.micro_batch_size or len(batch)
    learned = sum(example.n_learned for example in batch)
    total = 0.0
    for start in range(0, len(batch), size):
        loss = summed_loss(model, batch[start : start + size], pad_id=pad_id, device=device)
        # Divided by the whole batch's tokens: micro-batches do not change the gradient.
        (loss / learned).backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_norm))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise WarmupError(f"the loss became {total}, its gradient norm {norm}; lower --learning_rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def save(model: Any, tokenizer: Any, output_dir: Path) -> None:
    """A plain Hugging Face folder; generation ends at the token that was learned as the end."""
    generation = model.generation_config
    known = generation.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = ends if tokenizer.eos_token_id in ends else [tokenizer.eos_token_id, *ends]
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python examples/quickstart/warmup.py",
        description="Supervised warm-up on given judgements.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = take_negative_values(parser).add_argument
    add("--model_name_or_path", type=text_argument, required=True, help="Hugging Face folder or hub id")
    add("--data", required=True, help="file, folder or hub id with the columns prompt and response")
    add("--output_dir", type=path_argument, required=True)
    add("--learning_rate", type=float, default=WarmupConfig.learning_rate)
    add("--batch_size", type=int, default=WarmupConfig.batch_size, help="rows per optimizer step")
    add("--micro_batch_size", type=int, help="rows per forward pass; the whole batch when not given")
    add("--max_steps", type=int, help="optimizer steps")
    add("--num_epochs", type=float, help="passes over the data, instead of --max_steps")
    add("--lr_scheduler", default=WarmupConfig.lr_scheduler, help="cosine or constant")
    add("--warmup_steps", type=int, default=WarmupConfig.warmup_steps, help="steps over which the rate rises")
    add("--max_norm", type=float, default=WarmupConfig.max_norm, help="gradient clipping")
    add("--weight_decay", type=float, default=WarmupConfig.weight_decay)
    add("--max_len", type=int, default=2048, help="most tokens of a prompt with its response")
    add("--seed", type=int, default=WarmupConfig.seed)
    add("--log_steps", type=int, default=WarmupConfig.log_steps)
    add("--input_template", help="text with one {} for the prompt, as in training")
    add("--apply_chat_template", action="store_true", help="as in training")
    add("--enable_thinking", choices=("true", "false"), help="handed to the chat template when given")
    add("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict[str, float]]:
    """The whole warm-up; everything that can be wrong with the flags and data is found before training.

    FolderError while another program writes into --output_dir.
    """
    if args.output_dir.resolve() == Path(args.model_name_or_path).resolve():
        raise WarmupError("--output_dir is the folder of --model_name_or_path, which would be overwritten")
    with FolderLock(args.output_dir, "--output_dir"):
        return _run(args)


def _run(args: argparse.Namespace) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM

    config = WarmupConfig(**{k: v for k, v in vars(args).items() if k in WarmupConfig.__dataclass_fields__})
    device = Device.resolve(args.device, "fp32").current()
    thinking = None if args.enable_thinking is None else args.enable_thinking == "true"
    template = PromptTemplate(
        input_template=args.input_template, apply_chat_template=args.apply_chat_template, enable_thinking=thinking
    )
    tokenizer = load_tokenizer(args.model_name_or_path, name="--model_name_or_path")
    examples = load_examples(args.data, tokenizer=tokenizer, template=template, max_len=args.max_len)
    config.total_steps(len(examples))
    torch.manual_seed(config.seed)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise WarmupError(f"--model_name_or_path {args.model_name_or_path}: no model that loads: {error}") from error
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    history = train(model, examples, config, pad_id=pad_id, device=device, log_path=args.output_dir / METRICS_FILE)
    save(model, tokenizer, args.output_dir)
    logger.info("%s: loss %.4f after %d steps", args.output_dir, history[-1]["loss"], history[-1]["step"])
    return history


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    args = parse_args(argv)
    try:
        use_writable_caches()
        run(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
