"""What became of the policy: the judge's rewards step by step, and the task's own rule on answers before and after.

    python examples/judge_as_reward/report.py --log DIR/openrlhf.log --before DIR/policy_start --after DIR/policy \
      --prompts DIR/data/policy.jsonl --output DIR/result.json

Exit code 1 if the reward has not risen: the mean of the last five steps is not above that of the first five.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from task import LONGEST, quality

_STEP = re.compile(r"Global step (\d+): (\{.*)")
_NUMBER = r"'{}': (-?[\d.]+(?:e-?\d+)?)"
LOGGED = ("rollout/reward_mean", "judge_scored", "judge_mass", "response_length", "policy_loss", "actor_grad_norm")
_ENDS = 5


def read_steps(log: str) -> list[dict[str, float]]:
    """OpenRLHF's metrics of each step, as its log has them. ValueError for a log without steps."""
    steps = {}
    for number, values in _STEP.findall(log):
        found = {name: re.search(_NUMBER.format(re.escape(name)), values) for name in LOGGED}
        steps[int(number)] = {name: float(match[1]) for name, match in found.items() if match}
    if not steps or any("rollout/reward_mean" not in step for step in steps.values()):
        raise ValueError("the log has no steps of OpenRLHF with 'rollout/reward_mean'")
    return [{"step": number, **steps[number]} for number in sorted(steps)]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last five."""
    return statistics.fmean(values[:_ENDS]), statistics.fmean(values[-_ENDS:])


def mean_quality(model: Path, prompts: Sequence[str], *, seed: int, n: int = 256) -> float:
    """The rule's mean over n sampled answers; the judge has no part in it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    asked = [prompts[i % len(prompts)] for i in range(n)]
    given = tokenizer(asked, return_tensors="pt", add_special_tokens=False)  # all prompts have four words
    out = network.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        do_sample=True,
        top_k=0,
        max_new_tokens=LONGEST + 2,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return statistics.fmean(quality(text) for text in texts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Report a run of the example.")
    for name in ("log", "before", "after", "prompts", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = read_steps(args.log.read_text(encoding="utf-8", errors="replace"))
    first, last = ends([step["rollout/reward_mean"] for step in steps])
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {
        "seed": args.seed,
        "reward": {"first_5_steps": first, "last_5_steps": last},
        "quality_by_the_rule": {
            "before": mean_quality(args.before, prompts, seed=args.seed),
            "after": mean_quality(args.after, prompts, seed=args.seed),
        },
        "steps": steps,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"reward {first:.3f} -> {last:.3f}, quality by the rule {result['quality_by_the_rule']}: {args.output}")
    return 0 if last > first else 1


if __name__ == "__main__":
    sys.exit(main())
