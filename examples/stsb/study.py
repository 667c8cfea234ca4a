"""The STS-B example: its data, tests and sizes."""

from __future__ import annotations

from pathlib import Path

from examples.methods.plan import Example, Size, last_layers
from examples.stsb import prepare
from real_openrlhf.algo.score_scale import ScoreScale

EXAMPLE = Example(
    name="stsb",
    folder=Path(__file__).resolve().parent,
    scale=ScoreScale.parse("0-5"),
    prepare=prepare.main,
    tests=("test",),
    sizes={
        "tiny": Size(
            about="for tests: nothing is learned",
            seeds=(0,),
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
            both={"rollout.max_new_tokens": 8},
            save_steps=1,
        ),
        "cpu": Size(
            about="two cores, one seed: LoRA on the upper 16 of 30 layers, 300 test rows",
            seeds=(0,),
            dev_rows=100,
            test_rows=300,
            warmup={
                "train.batch_size": 32,
                "train.max_steps": 200,
                "eval.steps": 25,
                "warmup.patience": 3,
                "actor.adam.lr": 1e-3,
            },
            steps=16,
            curve_every=8,
            rates=(2e-4,),
            rl={},
            both=last_layers(14, 32),
            save_steps=25,
        ),
        "gpu": Size(
            about="one GPU, three seeds: all parameters, the whole test split, a search of learning rates",
            seeds=(0, 1, 2),
            dev_rows=400,
            warmup={
                "train.batch_size": 64,
                "train.max_steps": 900,
                "eval.steps": 45,
                "warmup.patience": 4,
                "actor.adam.lr": 1e-4,
            },
            steps=100,
            curve_every=20,
            rates=(1e-6, 5e-6, 2e-5),
            rl={"rollout.batch_size": 32, "rollout.n_samples_per_prompt": 8},
            both={"train.colocate_all": True, "vllm.enable_sleep": True, "ds.enable_sleep": True},
            keep_engines=False,
        ),
    },
)
