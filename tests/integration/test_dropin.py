"""The drop-ins inside OpenRLHF's own classes on a CPU, with the very code of the drop-ins' README.

Rollouts of OpenRLHF's engine class with vLLM go by way of the agent through OpenRLHF's sample processing, advantages,
replay buffer, Actor and `training_step`. What needs CUDA in between (its strategy, constructors) is plain torch here.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from real_openrlhf.actors.policy.model import accept_packed_rows, outputs_of
from real_openrlhf.actors.policy.trainer import loss_inputs
from real_openrlhf.algo.advantages import rloo_advantages
from real_openrlhf.algo.batch import collate, denominators_of, rows_of
from real_openrlhf.algo.loss import LossOptions, policy_loss
from real_openrlhf.algo.score_rows import ScoreRows
from real_openrlhf.algo.types import Coefficients, Group, Rollout, TrainGroup
from real_openrlhf.common.device import Device
from real_openrlhf.config.cli import parse_args
from real_openrlhf.config.openrlhf_args import to_openrlhf_args
from real_openrlhf.dropin.settings import RealSettings
from tests.helpers.tiny_judge import ANCHOR, make_rows

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "real_openrlhf/dropin/README.md").read_text(encoding="utf-8")
AGENT, TRAINER, LOOP, TRL, _ = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
# The page's files, for the tiny judge's anchor.
AGENT, TRAINER, TRL = (code.replace('"So the overall score is "', repr(ANCHOR)) for code in (AGENT, TRAINER, TRL))
SETTINGS = RealSettings(anchors=(ANCHOR,))
K, MAX_LEN = 4, 40
PROMPTS = make_rows(3, seed=5)


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenRLHF's path for machines without flash-attn's kernels."""
    monkeypatch.setitem(sys.modules, "flash_attn.ops.triton.cross_entropy", None)


def load(judges: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = judges / "tied"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def responses(judges: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """K rollouts of each prompt, by OpenRLHF's engine with the page's agent file."""
    from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
    from vllm import SamplingParams

    agent = tmp_path_factory.mktemp("agent") / "judge_agent.py"
    agent.write_text(AGENT)
    stock = RolloutRayActor.__ray_metadata__.modified_class.__ray_actor_class__
    device = Device.resolve("cpu", "fp32")
    os.environ.update(device.engine_env(1) | {"RAY_ADDRESS": "not used"})
    _, tokenizer = load(judges)

    async def run() -> list[list[dict[str, Any]]]:
        engine = stock.__new__(stock)
        await stock.__init__(
            engine,
            agent_func_path=str(agent),
            num_gpus=0,
            model=str(judges / "tied"),
            distributed_executor_backend="uni",
            dtype="float32",
            seed=1,
            max_model_len=MAX_LEN,
            enforce_eager=True,
            disable_log_stats=True,
            **device.engine_options(MAX_LEN),
        )
        # As SamplesGenerator asks, with importance weights off.
        params = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=12, min_tokens=1, logprobs=None)
        try:
            return [
                await engine.generate_responses(row["prompt"], row["label"], params, MAX_LEN, tokenizer, K)
                for row in PROMPTS
            ]
        finally:
            engine.llm.shutdown()

    try:
        return asyncio.run(run())
    finally:
        os.environ.pop("RAY_ADDRESS")


def test_the_agents_reward_is_that_of_the_models_own_logits(
    judges: Path, responses: list[list[dict[str, Any]]]
) -> None:
    model, tokenizer = load(judges)
    readable = 0
    for row, group in zip(PROMPTS, responses):
        assert len(group) == K
        for output in group:
            ids, ((start, end),) = output["observation_tokens"], output["action_ranges"]
            assert start == len(str(row["prompt"]).split())
            text = tokenizer.decode(ids[start:end])
            logs, label = output["extra_logs"], float(str(row["label"]))
            if not logs["real_readable"]:
                assert end == len(ids) and not text.endswith("score")
                continue
            readable += 1
            assert text.endswith("score")
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0, end - 1].double().log_softmax(0)
            p = {v: math.exp(float(logprobs[tokenizer.convert_tokens_to_ids(str(v))])) for v in range(1, 6)}
            expected = sum(v * q for v, q in p.items())
            assert output["reward"] == pytest.approx(-((expected - label) ** 2) + math.log(p[int(label)]), abs=1e-3)
            assert logs["real_mass"] == pytest.approx(sum(p.values()), abs=1e-4)
            assert output["scores"] == float(tokenizer.decode(ids[end : end + 1]).strip() == str(row["label"]))
    assert readable >= 2 * K


# -- OpenRLHF's way from responses to an update ----------------------------------------------------------


class PlainStrategy:
    """What training_step asks of DeepSpeed, in plain torch; nothing is stepped, so that gradients can be seen."""

    ring_attn_group = None

    def __init__(self, args: Any) -> None:
        self.args = args

    def backward(self, loss: Tensor, model: Any, optimizer: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str) -> None:
        pass

    def get_grad_norm(self, model: Any) -> float:
        return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def openrlhf_args(judges: Path) -> Any:
    args = to_openrlhf_args(
        parse_args(["--actor.model_name_or_path", str(judges / "tied")]), device_dtype="fp32", attn="sdpa"
    )
    args.rollout.n_samples_per_prompt = K
    args.algo.advantage.estimator, args.reward.clip_range = "group_norm", (-1, 1)
    args.algo.kl.init_coef, args.algo.kl.use_loss = 0.0, False
    args.actor.entropy_coef = None
    return args


def experience_of(judges: Path, responses: list[list[dict[str, Any]]], args: Any) -> tuple[Any, Any]:
    """-> OpenRLHF's Actor on the judge, and one micro-batch out of its replay buffer."""
    from openrlhf.models import Actor
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ppo_utils.replay_buffer import NaiveReplayBuffer
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    model, tokenizer = load(judges)
    actor = Actor(model, temperature=1.0)
    actor.packing_samples = False
    flat = [output for group in responses for output in group]
    samples = [
        SamplesGenerator._process_response_into_experience(None, output, max_len=MAX_LEN)  # type: ignore[arg-type]
        for output in flat
    ]
    for i, sample in enumerate(samples):
        sample.index = [i]
    experience = Experience.concat_experiences(samples, tokenizer.pad_token_id)
    with torch.no_grad():
        experience.action_log_probs = actor(experience.sequences, experience.action_mask, experience.attention_mask)
    experience.kl = torch.zeros_like(experience.action_log_probs)
    maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
    maker.strategy, maker.args, maker.kl_ctl = SimpleNamespace(args=args), args, SimpleNamespace(value=0.0)
    maker.advantage_estimator = args.algo.advantage.estimator
    maker.compute_advantages_and_returns([experience])
    buffer = NaiveReplayBuffer.__new__(NaiveReplayBuffer)
    buffer.items, buffer.limit = [], 0
    buffer.cpu_offload = buffer.dynamic_batch = buffer.packing_samples = False
    buffer.append(experience)
    return actor, buffer.collate_fn([buffer[i] for i in range(len(buffer))])


def run_page(name: str, code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": name}
    exec(compile(code, f"{name}.py", "exec"), scope)
    return scope


def test_openrlhfs_advantages_are_the_papers_but_for_a_factor(
    judges: Path, responses: list[list[dict[str, Any]]]
) -> None:
    """--algo.advantage.estimator group_norm with --reward.clip_range -1 1, as the page says."""
    _, experience = experience_of(judges, responses, openrlhf_args(judges))
    first = experience.action_mask.int().argmax(1, keepdim=True)
    got = experience.advantages.gather(1, first)[:, 0].view(-1, K)
    for row, group in zip(got, responses):
        rewards = torch.tensor([output["reward"] for output in group])
        wanted = rloo_advantages(rewards, clip=None) * math.sqrt((K - 1) / K)
        assert row.tolist() == pytest.approx(wanted.clamp(-1, 1).tolist(), abs=1e-4)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stock_trainer(judges: Path, actor: Any, args: Any) -> Any:
    """OpenRLHF's, as its constructor makes it where there is CUDA."""
    from openrlhf.models import PolicyLoss
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    trainer = ActorPPOTrainer.__new__(ActorPPOTrainer)
    _, trainer.tokenizer = load(judges)
    trainer.strategy, trainer.args = PlainStrategy(args), args
    trainer.actor, trainer.ema_model, trainer.actor_optim, trainer.aux_loss = actor, None, None, False
    trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    trainer.replay_buffer = None
    trainer.actor_loss_fn = PolicyLoss()
    return trainer


def with_the_pages_code(trainer: Any) -> None:
    trainer.__class__ = run_page("real_ppo", TRAINER)["RealTrainer"]
    trainer.add_real()


def with_the_patch(trainer: Any) -> None:
    from real_openrlhf.dropin.terms import Terms
    from real_openrlhf.dropin.terms_actors import TermsTrainer

    TermsTrainer.add_terms(trainer, Terms(settings=SETTINGS))


@pytest.mark.parametrize("add", [with_the_pages_code, with_the_patch])
def test_the_trainer_has_the_gradient_of_the_packages_own(
    judges: Path, responses: list[list[dict[str, Any]]], add: Any
) -> None:
    args = openrlhf_args(judges)
    actor, experience = experience_of(judges, responses, args)
    _, tokenizer = load(judges)
    trainer = stock_trainer(judges, actor, args)
    add(trainer)
    status = trainer.training_step(experience, 0.0, 0)
    got = gradients(actor.model)

    # The same by groups, packed rows and the policy's own loss.
    model, _ = load(judges)
    accept_packed_rows(model)
    first = experience.action_mask.int().argmax(1, keepdim=True)
    advantages = experience.advantages.gather(1, first)[:, 0].double().view(-1, K)
    groups = [
        train_group(tokenizer, group, adv, float(str(row["label"])))
        for row, group, adv in zip(PROMPTS, responses, advantages)
    ]
    rows = rows_of(groups)
    batch = collate(rows)
    outputs = outputs_of(model, batch, temperature=1.0, max_bytes=2**20)
    inputs = loss_inputs(batch, outputs.token_logprobs, outputs.label_logprobs, SETTINGS.score_scale.tensor())
    inputs = replace(inputs, rollout_logprobs=outputs.token_logprobs.detach())
    counts = denominators_of(rows, trains_score_token=False)
    result = policy_loss(inputs, options=LossOptions(ratio="clip"), denominators=counts)
    result.loss.backward()
    wanted = gradients(model)
    assert status["metrics"]["policy_loss"].item() == pytest.approx(result.loss.item(), rel=1e-4)
    assert result.terms["squared_error"].item() > 0 and result.terms["likelihood"].item() > 0
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    # OpenRLHF logs what the agent said, as means over the rollouts.
    rewards = [output["reward"] for group in responses for output in group]
    assert status["metrics"]["reward"].mean().item() == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    assert set(status["metrics"]) >= {"score", "real_readable", "real_expected", "real_abs_error", "real_mass"}


def test_without_real_flags_the_patch_leaves_openrlhfs_training_step(
    judges: Path, responses: list[list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs a module in OpenRLHF's place, which trains on recorded experiences by what it finds there."""
    from real_openrlhf import patch

    found: list[Any] = []

    def module(name: str, run_name: str) -> None:
        from openrlhf.trainer.ray import ppo_actor, vllm_engine
        from openrlhf.utils import config, get_strategy

        assert (name, run_name) == ("openrlhf.cli.train_ppo_ray", "__main__")
        args = openrlhf_args(judges)
        actor, experience = experience_of(judges, responses, args)
        stock_trainer(judges, actor, args).training_step(experience, 0.0, 0)
        classes = [ppo_actor.PolicyModelActor, ppo_actor.ActorPPOTrainer, vllm_engine.RolloutRayActor]
        found.append((gradients(actor.model), [*classes, config.hierarchize, get_strategy], sys.argv[1:]))

    module("openrlhf.cli.train_ppo_ray", "__main__")
    monkeypatch.setattr("runpy.run_module", module)
    theirs = ["--actor.adam.lr", "1e-6", "--train.seed=3"]
    assert patch.main(["openrlhf.cli.train_ppo_ray", *theirs]) == 0
    (wanted, before, _), (got, after, words) = found
    assert words == theirs and all(one is other for one, other in zip(before, after, strict=True))
    assert set(got) == set(wanted) and any(bool(g.any()) for g in got.values())
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def train_group(tokenizer: Any, group: list[dict[str, Any]], advantages: Tensor, label: float) -> TrainGroup:
    """OpenRLHF's responses as the package's own carriers, with the coefficients of REAL at beta = 1."""
    reader = SETTINGS.reader(tokenizer, {tokenizer.eos_token_id})
    rollouts = []
    for output in group:
        ((start, _),) = output["action_ranges"]
        ids = output["observation_tokens"][start:]
        reading = reader.read(ids)
        if reading.position is None:
            score_rows = ScoreRows.empty(5)
        else:
            score_rows = ScoreRows.single(reading.position, reader.bound.anchors[0].token_ids)
        rollouts.append(
            Rollout(
                token_ids=torch.tensor(ids),
                logprobs=torch.zeros(len(ids)),
                reading=reading,
                score_rows=score_rows,
                score_logprobs=torch.zeros(len(score_rows.rollout), 5),
                finish_reason="stop",
            )
        )
    readable = torch.tensor([r.reading.readable for r in rollouts]).double()
    prompt = torch.tensor(group[0]["observation_tokens"][: group[0]["action_ranges"][0][0]])
    return TrainGroup(
        group=Group(prompt_ids=prompt, label=label, rollouts=tuple(rollouts), row=0, weight_version=0),
        target=SETTINGS.target(label),
        coefficients=Coefficients(
            cot=advantages,
            score=torch.zeros(K).double(),
            squared_error=readable,
            likelihood=readable,
            rewards=torch.zeros(K).double(),
            advantages=advantages,
            zero_variance=False,
        ),
    )


def test_without_term_2_the_loss_is_policy_loss() -> None:
    """Same arguments, same logs, same gradient as OpenRLHF's class at beta = 0 with a mean over tokens."""
    import inspect

    from openrlhf.models.loss import PolicyLoss

    from real_openrlhf.dropin.loss import RealPolicyLoss

    theirs = list(inspect.signature(PolicyLoss.forward).parameters.values())
    ours = list(inspect.signature(RealPolicyLoss.forward).parameters.values())[: len(theirs)]
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    generator = torch.Generator().manual_seed(0)
    old, log_probs = (-torch.rand(3, 6, generator=generator) for _ in range(2))
    advantages = torch.tensor([0.5, -1.0, 0.25])[:, None].expand(3, 6)
    mask = (torch.arange(6) < torch.tensor([6, 3, 4])[:, None]).float()
    info = {"dp_size": 2, "batch_num_tokens": torch.tensor(20.0), "global_batch_size": torch.tensor(5.0)}
    rest = {"label_logprobs": torch.zeros(3, 5), "readable": torch.zeros(3, dtype=torch.bool), "labels": [1, 2, 3]}
    results = []
    for loss, more in (
        (PolicyLoss(clip_eps_low=0.1, clip_eps_high=0.2), {}),
        (RealPolicyLoss(SETTINGS, beta=0.0, aggregation="token_mean", clip_eps_low=0.1), rest),
    ):
        leaf = log_probs.clone().requires_grad_()
        value, clip_ratio, ppo_kl, vllm_kl, filtered = loss(leaf, old, advantages, action_mask=mask, **info, **more)
        value.backward()
        assert vllm_kl is None and filtered is None and leaf.grad is not None
        results.append([value.item(), clip_ratio.item(), ppo_kl.item(), *leaf.grad.flatten().tolist()])
    assert results[1] == pytest.approx(results[0], abs=1e-6)
    assert results[0][1] > 0


# Notes which class OpenRLHF's module is about to start, and ships it as Ray does.
PROBE = """
import argparse, runpy
from openrlhf.trainer.ray import ppo_actor
from ray import cloudpickle
parse = argparse.ArgumentParser.parse_args

def see(*args, **kwargs):
    actor = runpy.sys._getframe(1).f_globals["PolicyModelActor"]
    with open("actor.pkl", "wb") as file:
        cloudpickle.dump(actor.__ray_metadata__.modified_class, file)
    return parse(*args, **kwargs)

argparse.ArgumentParser.parse_args = see
runpy.run_path("real_ppo.py", run_name="__main__")
"""
# In the actor's process: OpenRLHF's own start makes the trainer, for which nothing is there here.
WORKER = """
import inspect, pickle
from openrlhf.trainer.ray import ppo_actor
with open("actor.pkl", "rb") as file:
    kind = pickle.load(file)
stock = next(base for base in kind.__mro__ if base.__module__ == ppo_actor.__name__)

def start(self, *args, **kwargs):
    self.trainer = ppo_actor.ActorPPOTrainer.__new__(ppo_actor.ActorPPOTrainer)

stock.init_model_from_pretrained = start
actor = kind.__new__(kind)
called = []
page = inspect.unwrap(kind.init_model_from_pretrained).__globals__["RealTrainer"]
page.add_real = lambda self: called.append(self)
actor.init_model_from_pretrained(None, "model")
assert called == [actor.trainer]
assert type(actor.trainer).training_step is page.training_step is not ppo_actor.ActorPPOTrainer.training_step
print("trainer", type(actor.trainer).__name__)
"""


def test_the_pages_launcher_starts_openrlhf_with_the_pages_trainer(tmp_path: Path) -> None:
    """As far as a machine without a GPU goes: OpenRLHF's module runs and ships our class to another process."""
    (tmp_path / "real_ppo.py").write_text(TRAINER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = []
    for code, more in ((PROBE, ["--help"]), (WORKER, [])):
        done = subprocess.run(
            [sys.executable, "-c", code, *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "--train.agent_func_path" in said[0] and "trainer RealTrainer" in said[1]


# -- a loop of one's own -----------------------------------------------------------------------------------


def held_out_reward(model: Any, tokenizer: Any) -> float:
    """Mean reward of given feedback on given prompts: what Term 2 improves, without any sampling."""
    rewards = []
    for row in make_rows(40, seed=77):
        ids = tokenizer([f"{row['prompt']} because {str(row['prompt']).split()[0]} score"], return_tensors="pt")
        with torch.no_grad():
            logprobs = model(ids["input_ids"]).logits[0, -1].double().log_softmax(0)
        labels = logprobs[[tokenizer.convert_tokens_to_ids(str(v)) for v in range(1, 6)]]
        rewards.append(SETTINGS.rewards(labels[None], torch.tensor([True]), [row["label"]]))
    return float(torch.cat(rewards).mean())


def test_the_pages_loop_has_the_papers_loss_and_trains_a_tiny_judge(judges: Path) -> None:
    torch.manual_seed(0)
    train_step = run_page("loop", LOOP)["train_step"]
    model, tokenizer = load(judges)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    drawn = []

    class Watched:
        """The model, with what it samples noted."""

        device = model.device

        def generate(self, **kwargs: Any) -> Tensor:
            drawn.append(model.generate(**kwargs))
            return drawn[-1]

        def __call__(self, **kwargs: Any) -> Any:
            return model(**kwargs)

    def step(number: int) -> tuple[float, dict[str, Any]]:
        row = make_rows(1, seed=100 + number)[0]
        loss, rewards = train_step(
            Watched(), tokenizer, optimizer, row["prompt"], row["label"], SETTINGS, max_new_tokens=10
        )
        assert rewards.shape == (8,)
        return float(loss), row

    before, (start, _) = held_out_reward(model, tokenizer), load(judges)
    loss, row = step(0)
    assert loss == pytest.approx(plain_loss(start, tokenizer, drawn[0], row), rel=1e-3)
    for number in range(1, 150):
        assert math.isfinite(step(number)[0])
    assert held_out_reward(model, tokenizer) > before


def by_token(
    model: Any, tokenizer: Any, prompt: list[int], response: list[int], y: float
) -> tuple[float, float | None]:
    """log pi of the feedback, and the reward; None without a score. In plain numbers, up to the first end of text."""
    words = tokenizer.convert_ids_to_tokens(response)
    end = words.index("</s>") if "</s>" in words else len(words) - 1
    last = max((i for i in range(end) if words[i] == "score"), default=None)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + response[: end + 1]])).logits[0].double().log_softmax(-1)
    until, before = (end if last is None else last) + 1, len(prompt)
    total = sum(float(logprobs[before + t - 1, response[t]]) for t in range(until))
    if last is None:
        return total, None
    p = [float(logprobs[before + last, tokenizer.convert_tokens_to_ids(str(v))]) for v in range(1, 6)]
    expected = sum(v * math.exp(q) for v, q in enumerate(p, start=1))
    return total, -((expected - y) ** 2) + p[int(y) - 1]


def plain_loss(model: Any, tokenizer: Any, sequences: Tensor, row: dict[str, Any]) -> float:
    """Eq. 8 at lambda = beta = 1, rollout by rollout."""
    n_prompt, y = len(str(row["prompt"]).split()), float(row["label"])
    pairs = [by_token(model, tokenizer, ids[:n_prompt], ids[n_prompt:], y) for ids in sequences.tolist()]
    floor = -max(v * v for v in (y, 5 - y)) + math.log(1e-6)
    rewards = [floor if reward is None else reward for _, reward in pairs]
    k = len(rewards)
    advantages = [r - (sum(rewards) - r) / (k - 1) for r in rewards]
    spread = math.sqrt(sum(a * a for a in advantages) / k)
    advantages = [min(1.0, max(-1.0, a / spread)) for a in advantages]
    term_2 = sum(reward for _, reward in pairs if reward is not None)
    return -sum(a * total for a, (total, _) in zip(advantages, pairs)) / k - term_2 / k


def test_the_pages_trl_trainer_has_the_papers_loss(judges: Path, tmp_path: Path) -> None:
    """Where TRL is installed; it is no requirement of the package."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    scope = run_page("real_grpo", TRL)
    seen: list[tuple[float, dict[str, Any]]] = []

    class Watched(scope["RealGRPOTrainer"]):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            loss: Tensor = super()._compute_loss(model, inputs)
            seen.append((loss.item(), inputs))
            return loss

    model, tokenizer = load(judges)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=10,
        max_steps=2,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
    )
    trainer = Watched(
        model=model,
        reward_funcs=scope["no_reward"],
        args=settings,
        train_dataset=Dataset.from_list(make_rows(32, seed=9)),
        processing_class=tokenizer,
    )
    trainer.train()
    start, _ = load(judges)  # TRL patches the model that it is given
    assert len(seen) == 4
    for loss, inputs in seen[:2]:  # both before the first update
        sums, terms = [], []
        for n in range(8):
            prompt, response = (
                inputs[f"{part}_ids"][n][inputs[f"{part}_mask"][n].bool()].tolist() for part in ("prompt", "completion")
            )
            total, reward = by_token(start, tokenizer, prompt, response, float(inputs["labels"][n]))
            sums.append(total)
            terms.append(reward)
        advantages = inputs["advantages"].tolist()
        assert max(map(abs, advantages)) <= 1 and len(set(advantages)) > 2
        wanted = -sum(a * s for a, s in zip(advantages, sums)) / 8 - sum(t or 0.0 for t in terms) / 8
        assert loss == pytest.approx(wanted / 2, rel=1e-3)
