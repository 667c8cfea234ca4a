"""The DeepSpeed policy against the same updates in plain torch: ZeRO 2 and 3, one rank and two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_openrlhf.actors.weight_transfer import free_port
from real_openrlhf.algo.batch import collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from tests.helpers.algo_factory import plain_rows
from tests.helpers.policy_worker import EPSILON, LEARNING_RATE, MAX_NORM, SCALE, UPDATES, WEIGHT_DECAY, make_groups

pytestmark = pytest.mark.integration


def run_policy(folder: Path, out: Path, *, stage: int, world: int, micro: int) -> dict:
    out.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "tests.helpers.policy_worker", str(folder), str(out)]
    command += ["--stage", str(stage), "--world", str(world), "--port", str(port), "--micro", str(micro)]
    processes = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=420)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return json.loads((out / "record.json").read_text(encoding="utf-8"))


def reference(folder: Path) -> tuple[torch.nn.Module, list[float], list[float]]:
    """The same updates with torch's AdamW, one forward over all rollouts; losses and gradient norms."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decays = [p for n, p in model.named_parameters() if "norm.weight" not in n and "layernorm.weight" not in n]
    others = [p for n, p in model.named_parameters() if "norm.weight" in n or "layernorm.weight" in n]
    groups = [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON)
    rows = rows_of(make_groups(model.config.vocab_size))
    batch = collate(rows)
    input_ids, attention_mask, columns = plain_rows(batch)
    denominators = denominators_of(rows, trains_score_token=False)
    losses, norms = [], []
    for _ in range(UPDATES):
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        output = model(input_ids, attention_mask=attention_mask.long(), position_ids=positions)
        logits = output.logits[:, columns]
        logprobs = logits.log_softmax(-1)
        tokens = logprobs.gather(-1, batch.response_ids[..., None])[..., 0].masked_fill(~batch.response_mask, 0.0)
        labels = torch.zeros(len(rows), len(SCALE))
        for row, node_rollout in enumerate(batch.score_rows.rollout.tolist()):
            position = int(batch.score_rows.position[row])
            labels[node_rollout] = logprobs[node_rollout, position, batch.score_rows.token_ids[row]]
        from real_openrlhf.actors.policy_trainer import loss_inputs

        inputs = loss_inputs(batch, tokens, labels, SCALE.tensor())
        loss = policy_loss(inputs, options=LossOptions(), denominators=denominators).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses, norms


@pytest.mark.parametrize(
    ("head", "stage", "world", "micro"),
    [
        ("tied", 2, 1, 3),
        ("untied", 3, 2, 4),
        pytest.param("untied", 2, 2, 16, marks=pytest.mark.slow),
        pytest.param("tied", 3, 1, 16, marks=pytest.mark.slow),
    ],
)
def test_updates_equal_plain_torch(judges: Path, tmp_path: Path, head: str, stage: int, world: int, micro: int) -> None:
    record = run_policy(judges / head, tmp_path / "out", stage=stage, world=world, micro=micro)
    model, losses, norms = reference(judges / head)
    assert [m["loss/total"] for m in record["metrics"]] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert [m["policy/grad_norm"] for m in record["metrics"]] == pytest.approx(norms, rel=1e-3)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(judges / head, dtype=torch.float32)
    moved = 0.0
    for (name, mine), theirs, old in zip(trained.named_parameters(), model.parameters(), start.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, float((mine - old).abs().max()))
    assert moved > 1e-3, "the weights did not move: the comparison would prove nothing"
    # Log-probs of the actor itself, after training, equal the exported model's.
    for ids, got in zip([[3, 4, 5, 6, 7], [8, 9, 3]], record["probe"]):
        logits = trained(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        want = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-5)
    # One forward and one backward per rollout and update, and no more.
    per_rank = UPDATES * 16 // world
    assert record["counts"] == {"forwards": per_rank, "backwards": per_rank, "updates": UPDATES}
    assert record["version"] == UPDATES
