"""The DeepSpeed policy against the same updates in plain torch: ZeRO 2 and 3, one rank and two, LoRA, a reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from real_openrlhf.actors.sync.transfer import free_port
from real_openrlhf.algo.batch import collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from tests.helpers.algo_factory import plain_rows
from tests.helpers.policy_worker import (
    EPSILON,
    LEARNING_RATE,
    LORA_ALPHA,
    MAX_NORM,
    SCALE,
    UPDATES,
    WEIGHT_DECAY,
    make_groups,
)

pytestmark = pytest.mark.integration


def run_policy(folder: Path, out: Path, *more: str, stage: int, world: int, micro: int) -> dict:
    out.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "tests.helpers.policy_worker", str(folder), str(out)]
    command += ["--stage", str(stage), "--world", str(world), "--port", str(port), "--micro", str(micro), *more]
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


def reference(
    folder: Path, *, lora: int = 0, kl: float = 0.0
) -> tuple[torch.nn.Module, list[float], list[float], list[float]]:
    """The same updates with torch's AdamW (and peft), one forward over all rollouts.

    Returns model, losses, gradient norms, and the mean of the k3 estimate of the KL to the start per token.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if lora:
        torch.manual_seed(42)
        model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=LORA_ALPHA, target_modules="all-linear"))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decays = [p for n, p in trained if "norm.weight" not in n and "layernorm.weight" not in n]
    others = [p for n, p in trained if "norm.weight" in n or "layernorm.weight" in n]
    groups = [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPSILON)
    rows = rows_of(make_groups(model.config.vocab_size))
    batch = collate(rows)
    input_ids, attention_mask, columns = plain_rows(batch)
    denominators = denominators_of(rows, trains_score_token=False)
    losses, norms, divergences = [], [], []
    start: Tensor | None = None
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
        from real_openrlhf.actors.policy.trainer import loss_inputs

        inputs = loss_inputs(batch, tokens, labels, SCALE.tensor())
        loss = policy_loss(inputs, options=LossOptions(), denominators=denominators).loss
        start = tokens.detach() if start is None else start
        k1 = tokens.detach() - start
        k3 = ((-k1.double()).exp() - 1 + k1.double()).clamp(max=10)
        divergences.append(float(k3.sum() / batch.response_mask.sum()))
        # Value k3, at most 10 per token as in OpenRLHF; gradient k1 * grad log pi, summed over tokens.
        loss = loss + kl * (k3 + k1 * (tokens - tokens.detach())).sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses, norms, divergences


@pytest.mark.parametrize(
    ("head", "stage", "world", "micro"),
    [
        ("tied", 2, 1, 3),
        ("untied", 3, 2, 4),
        pytest.param("untied", 2, 2, 16, marks=pytest.mark.slow),
        pytest.param("tied", 3, 1, 16, marks=pytest.mark.slow),
        pytest.param("tied", 0, 1, 3, marks=pytest.mark.slow),
        pytest.param("untied", 1, 2, 4, marks=pytest.mark.slow),
    ],
)
def test_updates_equal_plain_torch(judges: Path, tmp_path: Path, head: str, stage: int, world: int, micro: int) -> None:
    """With updates in between that are skipped, for numbers that are not finite on one rank."""
    record = run_policy(judges / head, tmp_path / "out", "--spoil", stage=stage, world=world, micro=micro)
    model, losses, norms, _ = reference(judges / head)
    check_updates(record, losses, norms)
    trained = check_weights(tmp_path / "out" / "model", model, judges / head)
    # Log-probs of the actor itself, after training, equal the exported model's.
    for ids, got in zip([[3, 4, 5, 6, 7], [8, 9, 3]], record["probe"]):
        logits = trained(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        want = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-5)
    # One forward and one backward per rollout and update, and no more.
    per_rank = UPDATES * 16 // world
    counts = {"forwards": per_rank, "backwards": per_rank, "updates": UPDATES, "reference_forwards": 0}
    assert record["counts"] == counts
    assert record["version"] == UPDATES


def check_updates(record: dict, losses: list[float], norms: list[float]) -> None:
    assert [m["loss/total"] for m in record["metrics"]] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert [m["policy/grad_norm"] for m in record["metrics"]] == pytest.approx(norms, rel=1e-3)


def check_weights(folder: Path, model: torch.nn.Module, start: Path) -> torch.nn.Module:
    """The exported weights against those of plain torch; the export is returned."""
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    old = dict(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).named_parameters())
    wanted, moved = dict(model.named_parameters()), 0.0
    assert wanted.keys() == dict(trained.named_parameters()).keys()
    for name, mine in trained.named_parameters():
        torch.testing.assert_close(mine, wanted[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, float((mine - old[name]).abs().max()))
    assert moved > 1e-3, "the weights did not move: the comparison would prove nothing"
    return trained


@pytest.mark.parametrize(
    ("head", "stage", "world", "micro", "kl"),
    [
        ("untied", 3, 2, 4, 0.5),
        ("tied", 2, 1, 3, 0.0),
        pytest.param("tied", 3, 1, 16, 0.5, marks=pytest.mark.slow),
        pytest.param("untied", 2, 2, 8, 0.5, marks=pytest.mark.slow),
    ],
)
def test_lora_equals_peft(
    judges: Path, tmp_path: Path, head: str, stage: int, world: int, micro: int, kl: float
) -> None:
    """With syncs in between, which plain torch does not have; the worker checks that they move nothing."""
    out, rank = tmp_path / "out", 4
    more = ("--lora", str(rank), "--kl", str(kl))
    record = run_policy(judges / head, out, *more, stage=stage, world=world, micro=micro)
    model, losses, norms, divergences = reference(judges / head, lora=rank, kl=kl)
    check_updates(record, losses, norms)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.get_base_model().parameters()) - trainable
    assert (record["facts"]["trainable_parameters"], record["facts"]["parameters"]) == (trainable, everything)
    if kl:
        assert [m["policy/kl"] for m in record["metrics"]] == pytest.approx(divergences, rel=1e-3, abs=1e-9)
        assert divergences[-1] > 1e-3
        assert record["counts"]["reference_forwards"] == 2 * 16 // world
    trained = check_weights(out / "model", model.merge_and_unload(), judges / head)
    # What the engines got, what was exported, and the adapter merged by peft are the same to the last bit.
    start = AutoModelForCausalLM.from_pretrained(judges / head, dtype=torch.float32)
    merged = PeftModel.from_pretrained(start, out / "model" / "adapter").merge_and_unload()
    # By CUDA IPC every rank hands over the whole weights.
    for file in ("pushed_0.pt", *(f"pushed_by_ipc_{rank}.pt" for rank in range(world))):
        pushed = torch.load(out / file)
        for others in (dict(trained.named_parameters()), dict(merged.named_parameters())):
            assert pushed.keys() == others.keys()
            assert [name for name, weight in pushed.items() if not weight.equal(others[name])] == []


@pytest.mark.parametrize(
    ("head", "stage", "world", "micro"), [("untied", 3, 2, 4), pytest.param("tied", 2, 1, 3, marks=pytest.mark.slow)]
)
def test_kl_to_a_reference_group(judges: Path, tmp_path: Path, head: str, stage: int, world: int, micro: int) -> None:
    record = run_policy(judges / head, tmp_path / "out", "--kl", "0.5", stage=stage, world=world, micro=micro)
    model, losses, norms, divergences = reference(judges / head, kl=0.5)
    check_updates(record, losses, norms)
    got = [m["policy/kl"] for m in record["metrics"]]
    # The policy and its reference begin as the same network.
    assert got[0] == pytest.approx(0.0, abs=1e-9)
    assert got == pytest.approx(divergences, rel=1e-3, abs=1e-9) and got[-1] > 1e-3
    check_weights(tmp_path / "out" / "model", model, judges / head)
    assert record["reference_counts"] == {"reference_forwards": 2 * 16 // world}
    assert record["counts"]["reference_forwards"] == 0


@pytest.mark.slow
def test_adam_in_cpu_memory(judges: Path, tmp_path: Path) -> None:
    """DeepSpeed compiles its CPU Adam at the first use on a machine."""
    record = run_policy(judges / "tied", tmp_path / "out", "--adam_offload", stage=2, world=1, micro=4)
    model, losses, norms, _ = reference(judges / "tied")
    check_updates(record, losses, norms)
    check_weights(tmp_path / "out" / "model", model, judges / "tied")
