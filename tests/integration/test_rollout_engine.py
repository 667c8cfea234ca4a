"""A real vLLM engine on tiny random models, fed by a sender in this process, without Ray."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from real_openrlhf.actors.engine.liveness import EngineDied
from real_openrlhf.actors.engine.spec import EngineSpec, EngineSpecError, logprobs_mode_for
from real_openrlhf.actors.sync.shared_memory import host_id
from real_openrlhf.actors.sync.transfer import SyncError, SyncGroup, free_port, make_plan, send_bucket, to_wire
from real_openrlhf.algo.bound_scale import BoundScale, bind_scale
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.common.device import Device
from real_openrlhf.data.prompt import Prompt

pytestmark = pytest.mark.integration

ANCHOR = "Score: "
WORDS = ["<unk>", "<eos>", "Score:", "1", "2", "3", "4", "5"] + [f"w{i}" for i in range(88)]
MAX_LEN = 160
BUCKET_BYTES = 40_000


def make_model(folder: Path, tied: bool) -> torch.nn.Module:
    """A random Llama with a tied head, or one with a separate head and biases."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_bias=not tied,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


class Stack:
    """One engine and the policy whose weights it gets."""

    def __init__(
        self,
        folder: Path,
        tied: bool,
        logprobs_mode: str = "raw_logprobs",
        dtype: str = "fp32",
        fp32_head: bool = True,
    ) -> None:
        from transformers import AutoTokenizer

        from real_openrlhf.actors.engine.rollout_engine import RolloutEngine

        self.model = make_model(folder, tied)
        self.bound = bind_scale(ScoreScale.parse("1-5"), AutoTokenizer.from_pretrained(folder), [ANCHOR])
        self.spec = EngineSpec(
            model=str(folder),
            device=Device.resolve("cpu", dtype),
            bound=self.bound,
            max_model_len=MAX_LEN,
            logprobs_mode=logprobs_mode,
            fp32_head=fp32_head,
        )
        self.loop = asyncio.new_event_loop()
        self.engine = RolloutEngine(self.spec)
        self.group: SyncGroup | None = None

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    def beside(self, work, coroutine):
        """Run the sender's work in a thread while the engine's coroutine runs; both must succeed."""
        errors = []

        def target():
            try:
                work()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        try:
            return self.run(coroutine)
        finally:
            thread.join()
            assert not errors, errors

    def connect(self, backend: str) -> None:
        if self.group is not None:
            self.group.destroy()
        port = free_port()

        def sender():
            self.group = SyncGroup.create("127.0.0.1", port, 0, 2, backend, 60, buffer_bytes=BUCKET_BYTES)

        ranks = self.beside(sender, self.engine.init_sync_group("127.0.0.1", port, 1, 2, backend, 60, BUCKET_BYTES))
        assert ranks == [1]

    def sync(self, version: int, rename: tuple[str, str] | None = None, drop: str | None = None) -> int:
        device = self.spec.device
        tensors = {n: p.detach().to(device.torch_dtype) for n, p in self.model.named_parameters() if n != drop}
        if rename:
            tensors = {rename[1] if n == rename[0] else n: p for n, p in tensors.items()}
        plan = make_plan([(n, p.shape, device.vllm_dtype) for n, p in tensors.items()], bucket_bytes=BUCKET_BYTES)
        assert len(plan) > 3

        def sender():
            for bucket in plan:
                send_bucket(self.group, bucket, [tensors[p.name] for p in bucket.parameters])

        wire = json.loads(json.dumps(to_wire(plan)))
        return self.beside(sender, self.engine.receive_weights(wire, version))

    def perturb(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

    @torch.no_grad()
    def exact(self, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        """[L, V]: row t predicts token t + 1."""
        return (self.model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)

    def difference(self) -> float:
        """Largest |engine - transformers| over the tokens of a few random sequences."""
        generator = torch.Generator().manual_seed(5)
        # 140 tokens: more than one block of the KV cache, which is what a prefix cache would serve.
        texts = [torch.randint(0, len(WORDS), (n,), generator=generator).tolist() for n in (2, 17, 140)]
        out = self.run(self.engine.prompt_logprobs(texts))
        worst = 0.0
        for ids, got in zip(texts, out):
            want = self.exact(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert got.shape == want.shape and got.dtype == torch.float32
            worst = max(worst, float((got - want).abs().max()))
        return worst

    def check_groups(self, groups, temperature: float) -> int:
        """Every log-prob of every rollout against transformers; the number of scores read."""
        n_read = 0
        labels = torch.tensor(self.bound.anchors[0].token_ids)
        for group in groups:
            prompt = group.prompt_ids.tolist()
            for rollout in group.rollouts:
                ids = rollout.token_ids.tolist()
                rows = self.exact(prompt + ids, temperature)[len(prompt) - 1 : -1]
                want = rows.gather(1, rollout.token_ids[:, None])[:, 0]
                torch.testing.assert_close(rollout.logprobs, want, atol=1e-4, rtol=0)
                position = rollout.reading.position
                # Found by an independent look: the token after the last anchor (index 2).
                anchors = [i for i, token in enumerate(ids) if token == 2]
                assert position == (anchors[-1] + 1 if anchors and anchors[-1] + 1 < len(ids) else None)
                assert rollout.finish_reason == ("stop" if ids[-1] == 1 else "length")
                if position is not None:
                    n_read += 1
                    torch.testing.assert_close(rollout.score_logprobs[0], rows[position, labels], atol=1e-4, rtol=0)
        return n_read

    def rebind(self, bound: BoundScale) -> None:
        """Another scale for the same engine; vLLM itself knows nothing of scales."""
        self.bound, self.engine.spec = bound, replace(self.spec, bound=bound)
        self.engine.reader = ScoreReader.build(bound, self.engine.tokenizer, self.engine.reader.end_ids)

    def check_label_products(self, groups, first: list[str], second: str) -> tuple[int, int]:
        """Labels "f" and "f second" for f of `first`, against products of plain forwards.

        Returns how many scores were read, and how many rows were in responses that wrote an "f" and went on.
        """
        n_read = n_passed = 0
        heads, tail = [WORDS.index(word) for word in first], WORDS.index(second)
        for group in groups:
            prompt = group.prompt_ids.tolist()
            for rollout in group.rollouts:
                if rollout.reading.position is None:
                    continue
                n_read += 1
                n_passed += rollout.score_length - 1
                cot = prompt + rollout.token_ids.tolist()[: rollout.reading.position]
                at = self.exact(cot)[-1].double().exp()
                going_on = torch.stack([self.exact([*cot, head])[-1, tail] for head in heads]).double().exp()
                want = torch.cat([at[heads] * (1 - going_on), at[heads] * going_on])
                got = rollout.score_rows.label_logprobs(rollout.score_logprobs)[0]
                torch.testing.assert_close(got.double(), want.log(), atol=1e-4, rtol=0)
        return n_read, n_passed

    def close(self) -> None:
        self.run(self.engine.shutdown())
        if self.group is not None:
            self.group.destroy()
        self.loop.close()


def prompts(n: int, length: int = 12) -> list[Prompt]:
    ids = torch.randint(3, len(WORDS), (n, length), generator=torch.Generator().manual_seed(1)).tolist()
    return [Prompt(token_ids=tuple(row), label=2.0, row=10 + i, text="") for i, row in enumerate(ids)]


@pytest.fixture
def stack(tmp_path, request):
    """The engine of the requested kind; its processes are ended, whatever happens."""
    environment, others = dict(os.environ), {p.pid for p in psutil.Process().children(recursive=True)}
    made = Stack(tmp_path, **request.param)
    mine = [p for p in psutil.Process().children(recursive=True) if p.pid not in others]
    # multiprocessing's own helper lives as long as this process.
    mine = [p for p in mine if "resource_tracker" not in " ".join(p.cmdline())]
    try:
        yield made
    finally:
        made.close()
        os.environ.clear()
        os.environ.update(environment)
        _, alive = psutil.wait_procs(mine, timeout=20)
        for process in alive:
            process.kill()
    assert mine and not alive


@pytest.mark.parametrize("stack", [{"tied": True}], indirect=True, ids=["tied"])
def test_sync_and_generate(stack: Stack) -> None:
    engine, sampling = stack.engine, Sampling(n=4, temperature=1.0, top_p=1.0, max_new_tokens=24, seed=7)
    assert stack.run(engine.ready())
    assert stack.run(engine.sync_version()) == -1
    with pytest.raises(SyncError, match="no weights"):
        stack.run(engine.generate(prompts(1), sampling))
    assert stack.run(engine.sync_hosts()) == [host_id()]
    stack.connect("gloo")

    # The first sync replaces dummy weights; the next ones replace stale ones.
    assert stack.difference() > 0.1
    assert stack.sync(1) == 1
    assert stack.difference() < 1e-3
    stack.perturb()
    assert stack.difference() > 0.05
    assert stack.sync(2) == 2 == stack.run(engine.sync_version())
    assert stack.difference() < 1e-3

    # Rollouts: exact log-probs, of this version, one group per prompt in order.
    batch = prompts(6)
    groups = stack.run(engine.generate(batch, sampling))
    assert [g.row for g in groups] == [p.row for p in batch]
    assert [tuple(g.prompt_ids.tolist()) for g in groups] == [p.token_ids for p in batch]
    assert {len(g) for g in groups} == {4} and {g.weight_version for g in groups} == {2}
    assert stack.check_groups(groups, 1.0) >= 1

    # The same seed gives the same responses, alone and in another order; samples differ among themselves.
    again = stack.run(engine.generate(list(reversed(batch)), sampling))[::-1]
    alone = stack.run(engine.generate(batch[2:3], sampling))[0]
    for one, two in zip([*groups, groups[2]], [*again, alone]):
        assert [r.token_ids.tolist() for r in one.rollouts] == [r.token_ids.tolist() for r in two.rollouts]
        assert len({tuple(r.token_ids.tolist()) for r in one.rollouts}) == 4
    other = stack.run(engine.generate(batch, replace(sampling, seed=8)))
    assert other[0].rollouts[0].token_ids.tolist() != groups[0].rollouts[0].token_ids.tolist()

    # More prompt tokens than one forward pass of the engine takes, each with its own seed.
    many = stack.run(engine.generate(prompts(60, length=120), replace(sampling, n=1, max_new_tokens=2)))
    assert [g.row for g in many] == [10 + i for i in range(60)]

    # Greedy: the argmax, with the log-probs of temperature 1.
    greedy = stack.run(engine.generate(batch, Sampling(n=1, temperature=0.0, top_p=1.0, max_new_tokens=24)))
    stack.check_groups(greedy, 1.0)
    for group in greedy:
        ids = group.rollouts[0].token_ids
        rows = stack.exact(group.prompt_ids.tolist() + ids.tolist())[len(group.prompt_ids) - 1 : -1]
        assert torch.equal(rows.argmax(-1), ids)

    # Responses continued out of the engine's cache: the same tokens, with exact log-probs.
    sampling_on = Sampling(n=1, temperature=0.0, top_p=1.0, max_new_tokens=24, seed=7)
    whole = stack.run(engine.generate(batch, sampling_on))
    begun = [replace(p, given_ids=tuple(g.rollouts[0].token_ids[:3].tolist())) for p, g in zip(batch, whole)]
    tails = stack.run(engine.generate(begun, replace(sampling_on, max_new_tokens=21, continues=True)))
    assert [g.rollouts[0].token_ids.tolist() for g in tails] == [g.rollouts[0].token_ids.tolist() for g in whole]
    for group, tail in zip(whole, tails):
        torch.testing.assert_close(tail.rollouts[0].logprobs[3:], group.rollouts[0].logprobs[3:], atol=1e-4, rtol=0)

    # A scale of single tokens takes one request per response.
    before = stack.run(engine.finished_requests())
    stack.run(engine.generate(batch, sampling))
    assert stack.run(engine.finished_requests()) == before + 24

    # Labels that go on into longer ones, as "1" into "10": exact also where a response wrote something else.
    first, second = [f"w{i}" for i in range(6)], "w6"
    labels = [*first, *(f"{word} {second}" for word in first)]
    scale = ScoreScale.parse(",".join(f"{i}={label}" for i, label in enumerate(labels)))
    single = stack.bound
    stack.rebind(bind_scale(scale, engine.tokenizer, [ANCHOR]))
    for seed in (7, None):
        before = stack.run(engine.finished_requests())
        several = stack.run(engine.generate(batch, replace(sampling, n=8, seed=seed)))
        n_read, n_passed = stack.check_label_products(several, first, second)
        assert n_read >= 1
        assert stack.run(engine.finished_requests()) == before + 48 + 6 * n_read - n_passed
        if seed is not None:
            again = stack.run(engine.generate(batch, replace(sampling, n=8, seed=seed)))
            for one, two in zip(several, again):
                assert all(torch.equal(a.score_logprobs, b.score_logprobs) for a, b in zip(one.rollouts, two.rollouts))
    with pytest.raises(EngineSpecError, match="149 new ones"):
        stack.run(engine.generate(batch, replace(sampling, max_new_tokens=MAX_LEN - 12)))
    stack.rebind(single)

    # What cannot be answered exactly is refused.
    with pytest.raises(EngineSpecError, match="raw_logprobs"):
        stack.run(engine.generate(batch, replace(sampling, temperature=0.7)))
    with pytest.raises(EngineSpecError, match="row 10"):
        stack.run(engine.generate(batch, replace(sampling, max_new_tokens=MAX_LEN)))

    # A failed sync names the parameter, leaves the engine without a version, and the next one heals it.
    with pytest.raises(Exception, match=r"model\.layers\.0\.nonsense"):
        stack.sync(3, rename=("model.layers.0.self_attn.q_proj.weight", "model.layers.0.nonsense"))
    with pytest.raises(SyncError, match="no weights"):
        stack.run(engine.generate(batch, sampling))
    with pytest.raises(Exception, match=r"no value to 1 parameters of the engine: .*norm"):
        stack.sync(4, drop="model.norm.weight")
    assert stack.sync(5) == 5
    assert stack.difference() < 1e-3

    # The same by memory that both have mapped; a failed sync leaves it usable there, too.
    stack.connect("shared_memory")
    with pytest.raises(Exception, match=r"model\.layers\.0\.nonsense"):
        stack.sync(6, rename=("model.layers.0.self_attn.q_proj.weight", "model.layers.0.nonsense"))
    for _ in range(2):
        stack.perturb()
        assert stack.difference() > 0.05
        assert stack.sync(5) == 5
        assert stack.difference() < 1e-3

    # A sender that never comes: an error after the deadline, and the engine still answers.
    with pytest.raises(Exception, match="not formed within 1 s"):
        stack.run(engine.init_sync_group("127.0.0.1", free_port(), 1, 2, "gloo", 1.0))
    assert stack.run(engine.ready())


@pytest.mark.parametrize(
    "stack", [{"tied": False, "logprobs_mode": logprobs_mode_for(0.7, 1.0)}], indirect=True, ids=["untied"]
)
def test_untied_head_and_other_temperatures(stack: Stack) -> None:
    stack.connect("shared_memory")
    assert stack.difference() > 0.1
    stack.sync(1)
    assert stack.difference() < 1e-3  # prompt log-probs are at temperature 1 in this mode, too
    stack.perturb()
    assert stack.difference() > 0.05
    stack.sync(2)
    assert stack.difference() < 1e-3
    for backend in ("gloo", "shared_memory"):
        stack.perturb()
        assert stack.difference() > 0.05
        stack.connect(backend)
        stack.sync(3)
        assert stack.difference() < 1e-3

    sampling = Sampling(n=4, temperature=0.7, top_p=1.0, max_new_tokens=24, seed=7)
    groups = stack.run(stack.engine.generate(prompts(6), sampling))
    assert stack.check_groups(groups, 0.7) >= 1
    greedy = replace(sampling, n=1, temperature=0.0)

    async def mixed():
        # Greedy and sampled requests in one engine batch.
        return await asyncio.gather(
            stack.engine.generate(prompts(6), sampling), stack.engine.generate(prompts(6), greedy)
        )

    sampled, best = stack.run(mixed())
    stack.check_groups(sampled, 0.7)
    stack.check_groups(best, 1.0)
    with pytest.raises(EngineSpecError, match="use top_p 1"):
        stack.run(stack.engine.generate(prompts(1), replace(sampling, top_p=0.9)))
    check_death(stack, sampling)


def check_death(stack: Stack, sampling: Sampling) -> None:
    """The engine's process is killed while it answers: who waits gets an error, and no shared memory is left."""
    family = psutil.Process().children(recursive=True)
    (core,) = (p for p in family if "EngineCore" in " ".join(p.cmdline()))
    segments = {
        line.split()[5]
        for process in family
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        if "/dev/shm/psm_" in line
    }
    assert segments and all(Path(name).exists() for name in segments)
    assert stack.run(stack.engine.ready())  # takes their names away, as every run does
    core.suspend()

    async def killed() -> None:
        # Seeded requests begin with a pause, for whose answer vLLM's client would wait for ever.
        waiting = [
            asyncio.ensure_future(stack.engine.generate(prompts(6), sampling)),
            asyncio.ensure_future(stack.engine.prompt_logprobs([[3, 4, 5]])),
        ]
        await asyncio.sleep(1.0)
        assert not any(task.done() for task in waiting)
        core.kill()
        for task in waiting:
            with pytest.raises(EngineDied, match="process ended during"):
                await task
        for call in (stack.engine.ready(), stack.engine.sleep(), stack.engine.receive_weights([], 4)):
            with pytest.raises(EngineDied):
                await call

    stack.run(asyncio.wait_for(killed(), timeout=120))
    assert not [name for name in segments if Path(name).exists()]
