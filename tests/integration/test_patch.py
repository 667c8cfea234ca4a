"""`python -m real_openrlhf.patch` with OpenRLHF's own command on a CPU: a whole run, with and without REAL's terms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_judge import ANCHOR, make_rows, write_rows

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
REWARD = """
import torch

def reward_func(queries, prompts, labels):
    words = [query[len(prompt):].split() for query, prompt in zip(queries, prompts)]
    rewards = torch.tensor([float(found.count("fine") - found.count("rude")) for found in words])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
"""
PAPER = ["--algo.advantage.estimator", "group_norm", "--reward.clip_range", "-1", "1"]
REAL = ["--real.scale", "1-5", "--real.anchor", ANCHOR, *PAPER]


def run(judges: Path, folder: Path, *more: str) -> tuple[str, list[dict[str, float]]]:
    """Two steps of 8 prompts with 4 rollouts. -> what was said, OpenRLHF's metrics of each step"""
    prompts = write_rows(
        folder / "prompts.jsonl", [{**row, "label": str(row["label"])} for row in make_rows(16, seed=3)]
    )
    flags = f"""
        --real.device cpu --actor.model_name_or_path {judges}/tied --actor.num_gpus_per_node 1 --vllm.num_engines 1
        --vllm.enforce_eager --data.prompt_dataset {prompts} --data.input_key prompt --data.label_key label
        --data.max_len 40 --rollout.max_new_tokens 10 --rollout.batch_size 8 --rollout.n_samples_per_prompt 4
        --rollout.micro_batch_size 8 --train.batch_size 32 --train.micro_batch_size 8 --train.num_episodes 1
        --algo.kl.init_coef 0 --actor.adam.lr 1e-2 --actor.lr_scheduler constant --actor.lr_warmup_ratio 0
        --ckpt.output_dir {folder}/model
    """.split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "real_openrlhf.patch", "openrlhf.cli.train_ppo_ray", *flags, *more]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    steps = []
    for values in re.findall(r"Global step \d+: (\{.*)", said):
        steps.append({name: float(value) for name, value in re.findall(r"'([\w/]+)': (-?[\d.]+(?:e-?\d+)?)", values)})
    return said, steps


def agent_file(folder: Path) -> str:
    """The page's agent, for the tiny judge's anchor."""
    page = (ROOT / "real_openrlhf/dropin/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# judge_agent\.py\n.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    path = folder / "judge_agent.py"
    path.write_text(code.replace('"So the overall score is "', repr(ANCHOR)))
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


@pytest.mark.slow
def test_a_stock_run_trains_on_a_cpu(judges: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    said, steps = run(
        judges, tmp_path, "--reward.remote_url", f"{tmp_path}/reward.py", "--algo.advantage.estimator", "rloo"
    )
    assert len(steps) == 2 and all(step["actor_grad_norm"] > 0 for step in steps)
    assert "real_readable" not in said and "on a CPU: WorkerWrap.update_weight" in said
    before, after = weights(judges / "tied"), weights(tmp_path / "model")
    assert any(not torch.allclose(before[name], after[name], atol=1e-3) for name in before)


@pytest.mark.parametrize("terms", ["both", pytest.param("term_1", marks=pytest.mark.slow)])
def test_the_same_command_trains_a_judge(judges: Path, tmp_path: Path, terms: str) -> None:
    """Both terms by --real.* flags; Term 1 by the page's agent in OpenRLHF's own trainer."""
    more = REAL if terms == "both" else [*PAPER, "--train.agent_func_path", agent_file(tmp_path)]
    _, steps = run(judges, tmp_path, *more)
    assert len(steps) == 2
    # One step of Term 1 may have nothing to learn from: requests have no seeds, and feedback of one prompt may agree.
    assert any(step["actor_grad_norm"] > 0 for step in steps)
    for step in steps:
        assert 0 < step["real_readable"] <= 1
        assert 1 <= step["real_expected"] / step["real_readable"] <= 5 and step["real_mass"] <= 1
