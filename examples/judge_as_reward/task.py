"""Data of the example: answers of a few words, which a judge scores by how many kind and unkind words they have.

python examples/judge_as_reward/task.py --output_dir runs/judge_as_reward/seed_0/data

Writes words.txt, all words of the task; judge_sft.jsonl and judge.jsonl, for the judge: prompt and response, prompt and
label; policy_sft.jsonl and policy.jsonl, for the policy: prompt and response, prompts alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

KIND = ("clear", "calm", "sound", "warm")
UNKIND = ("vague", "rude", "wrong", "cold")
PLAIN = ("long", "short", "old", "new", "red", "round", "small", "deep")
TOPICS = ("sea", "road", "bread", "moon", "rain", "tree", "stone", "bird")
MARKS = ("tell", "of", "answer", "judge", "because", "none", "up", "down", "score", *"12345")
LONGEST = 8
ANCHOR = "score "
# Raters are one off in a fifth of the cases.
NOISE = (-1, 0, 0, 0, 0, 0, 0, 0, 0, 1)


def quality(answer: str) -> int:
    """The rule, without raters' noise: 3, one more per kind and one less per unkind word, from 1 to 5."""
    words = answer.split()
    return min(5, max(1, 3 + sum(w in KIND for w in words) - sum(w in UNKIND for w in words)))


def feedback(answer: str) -> str:
    said = [f"{w} {'up' if w in KIND else 'down'}" for w in answer.split() if w in KIND + UNKIND]
    return " ".join(["because", *(said or ["none"])])


def make_answer(rng: random.Random) -> str:
    return " ".join(rng.choice(KIND + UNKIND + PLAIN) for _ in range(rng.randint(2, LONGEST)))


def make_instruction(rng: random.Random) -> str:
    return f"tell of {rng.choice(TOPICS)} {rng.choice(TOPICS)}"


def rated(answer: str, rng: random.Random) -> int:
    return min(5, max(1, quality(answer) + rng.choice(NOISE)))


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path, *, seed: int, n_sft: int, n_judge: int, n_policy: int) -> None:
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = (*KIND, *UNKIND, *PLAIN, *TOPICS, *MARKS)
    (folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")

    def judged() -> tuple[str, str]:
        answer = make_answer(rng)
        return f"{make_instruction(rng)} answer {answer} judge", answer

    sft = [(prompt, f"{feedback(a)} {ANCHOR}{rated(a, rng)}") for prompt, a in (judged() for _ in range(n_sft))]
    write(folder / "judge_sft.jsonl", [{"prompt": p, "response": r} for p, r in sft])
    labelled = [(prompt, rated(a, rng)) for prompt, a in (judged() for _ in range(n_judge))]
    write(folder / "judge.jsonl", [{"prompt": p, "label": y} for p, y in labelled])
    own = [(make_instruction(rng), make_answer(rng)) for _ in range(n_sft)]
    write(folder / "policy_sft.jsonl", [{"prompt": p, "response": r} for p, r in own])
    write(folder / "policy.jsonl", [{"prompt": make_instruction(rng)} for _ in range(n_policy)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the judge and of the policy.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_sft", type=int, default=12000)
    parser.add_argument("--n_judge", type=int, default=512)
    parser.add_argument("--n_policy", type=int, default=960)
    args = parser.parse_args()
    write_files(args.output_dir, seed=args.seed, n_sft=args.n_sft, n_judge=args.n_judge, n_policy=args.n_policy)


if __name__ == "__main__":
    main()
