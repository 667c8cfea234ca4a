"""The MT-Bench example: its data, tests and sizes."""

from __future__ import annotations

from pathlib import Path

from examples.methods.plan import Example, Size, last_layers
from examples.mtbench import prepare
from real_openrlhf.algo.score_scale import ScoreScale

_TOKENIZER = ("--tokenizer", "{model}")
_SHORT = ("--max_prompt", "288", "--max_prompt_vicuna", "352", "--max_response", "112")

EXAMPLE = Example(
    name="mtbench",
    folder=Path(__file__).resolve().parent,
    scale=ScoreScale.parse("1-10"),
    prepare=prepare.main,
    # Vicuna's scores are stretched to this scale: correlations only.
    tests=("test", "vicuna"),
    sizes={
        "tiny": Size(
            about="for tests: nothing is learned",
            seeds=(0,),
            prepare=_TOKENIZER,
            dev_rows=4,
            test_rows=6,
            warmup={
                "train.batch_size": 4,
                "train.max_steps": 2,
                "eval.steps": 1,
                "warmup.patience": 1,
                "actor.adam.lr": 1e-3,
            },
            steps=1,
            curve_every=1,
            rates=(1e-4,),
            rl={"rollout.batch_size": 2, "rollout.n_samples_per_prompt": 2},
            both={"rollout.max_new_tokens": 8, "data.max_len": 256},
            save_steps=1,
        ),
        "cpu": Size(
            about="two cores, one seed: short rows, LoRA on the upper 16 of 30 layers",
            seeds=(0,),
            prepare=(*_TOKENIZER, *_SHORT),
            dev_rows=50,
            test_rows=120,
            warmup={
                "train.batch_size": 16,
                "train.max_steps": 60,
                "eval.steps": 15,
                "warmup.patience": 2,
                "actor.adam.lr": 1e-3,
            },
            steps=10,
            curve_every=10,
            rates=(2e-4,),
            rl={"rollout.batch_size": 8, "rollout.n_samples_per_prompt": 8},
            both=last_layers(14, 32),
            save_steps=5,
        ),
        "gpu": Size(
            about="one GPU, three seeds: all parameters, rows of up to 1,024 tokens, a search of learning rates",
            seeds=(0, 1, 2),
            prepare=(*_TOKENIZER, "--max_prompt", "1024", "--max_response", "250"),
            dev_rows=200,
            warmup={
                "train.batch_size": 64,
                "train.max_steps": 400,
                "eval.steps": 25,
                "warmup.patience": 4,
                "actor.adam.lr": 1e-4,
            },
            steps=100,
            curve_every=20,
            rates=(1e-6, 5e-6, 2e-5),
            rl={"rollout.batch_size": 32, "rollout.n_samples_per_prompt": 8},
            both={
                "train.colocate_all": True,
                "vllm.enable_sleep": True,
                "ds.enable_sleep": True,
                "data.max_len": 1408,
                "rollout.max_new_tokens": 256,
            },
            keep_engines=False,
        ),
    },
)
