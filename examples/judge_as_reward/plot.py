"""The judge's reward step by step, one line per run.

    python examples/judge_as_reward/plot.py --results DIR/result.json ... --output reward.png

The legend has the mean quality of sampled answers by the task's own rule, before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(results: list[dict[str, Any]], output: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for result in results:
        steps = result["steps"]
        quality = result["quality_by_the_rule"]
        label = f"seed {result['seed']}: by the rule {quality['before']:.2f} to {quality['after']:.2f}"
        axes.plot([step["step"] for step in steps], [step["rollout/reward_mean"] for step in steps], label=label)
    axes.set_xlabel("step of OpenRLHF's RLOO")
    axes.set_ylabel("mean reward: the judge's E[score]")
    axes.set_ylim(1, 5)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(output, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw runs of the example.")
    parser.add_argument("--results", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw([json.loads(path.read_text(encoding="utf-8")) for path in args.results], args.output)


if __name__ == "__main__":
    main()
