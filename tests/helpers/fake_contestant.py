"""Speaks the benchmark's protocol without a model: seconds and memory are made up from the number of tokens.

FAKE_CONTESTANT=name:behaviour,... makes a contestant misbehave: "hang" (on any step but the warm-ups), "die", "deny",
"noise" (words that are no JSON), "broken" (never ready), "nan".
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    words = sys.argv[1:]
    flags = dict(zip(words[::2], words[1::2]))
    name = flags["--contestant"]
    behaviour = dict(part.split(":") for part in os.environ.get("FAKE_CONTESTANT", "").split(",") if part).get(name)
    if behaviour == "broken":
        print(json.dumps({"error": "no such model"}), flush=True)
        return
    print(
        json.dumps({"ready": True, "facts": {"model": flags["--model"]}, "overrides": [f"{name} override"]}), flush=True
    )
    factor = {"real": 1, "openrlhf": 4, "authors": 5}[name]
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            return
        case = request["case"]
        warm_up = case["prompt"] in (64, 128) and case["response"] in (16, 32) and case["samples"] <= 4
        if behaviour == "hang" and not warm_up:
            time.sleep(600)
        if behaviour == "die" and not warm_up:
            print("out of everything", file=sys.stderr, flush=True)
            os._exit(7)
        if behaviour == "noise":
            print("Loading checkpoint shards", flush=True)
        tokens = case["prompt"] + case["samples"] * case["response"]
        total = factor * tokens * 1e-3
        print(
            json.dumps(
                {"error": "cannot"}
                if behaviour == "deny" and not warm_up
                else {
                    "contestant": name,
                    "case": case,
                    "seconds": {"forward": total / 4, "backward": total / 2},
                    "total": total,
                    "peak_bytes": factor * tokens * 2**20,
                    "loss": float("nan") if behaviour == "nan" and not warm_up else 0.5,
                    "facts": {"logprob_sum": -8.0 * tokens * (1 + 1e-6 * factor)},
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
