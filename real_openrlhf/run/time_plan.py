"""Seconds of a step's phases, from operations and bytes at stated shares of what the cards do. Estimates, no promises.

Every response is taken to be as long as it may be and every prompt to have the mean length; waves that refill dropped
groups, and evaluations, come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from real_openrlhf.common.cards import CardRates
from real_openrlhf.common.device import GPU_SEQUENCES
from real_openrlhf.config.schema import Config
from real_openrlhf.run.memory import EngineMemory, Question, cache_bytes
from real_openrlhf.run.states import policy_states

# Of the card's matrix rate, by what is computed: one H100, Qwen3-1.7B's shape, with Liger's layers 360 TFLOP/s of 989
# and without 264 (tests/gpu/results/h100/step.json).
TRAIN_SHARE = {True: 0.36, False: 0.27}
# One H100: 512 rollouts of 128 tokens of a model of 0.27 GB took 2.04 s, hence 16 ms per pass that no weights explain
# (tests/gpu/results/h100/log_engine.txt).
PASS_SECONDS = 0.016
# Bytes per second of the weight sync: inside a GPU (sync.json), and through CPU memory by gloo.
IPC_BANDWIDTH, GLOO_BANDWIDTH = 265e9, 0.7e9
# Not measured here: the share of a memory's or a link's bandwidth that is reached, bytes per second of a GPU's part of
# the network between nodes, of its way to CPU memory, and of Adam's states that a node's CPUs update.
BANDWIDTH_SHARE = 0.6
NETWORK, TO_HOST, CPU_ADAM = 25e9, 25e9, 100e9


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """bound: what takes the time."""

    name: str
    seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """card: whose rates they are. at_once: rollouts that an engine writes at a time."""

    card: str
    phases: tuple[PhaseTime, ...]
    at_once: int

    @property
    def step(self) -> float:
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cards, and how the policy lies on nodes."""

    card: str
    rates: CardRates

    def gather(self, config: Config, bytes_: float) -> float:
        """Seconds in which every policy rank gets all of what is divided among them."""
        ranks, nodes = config.ranks, config.actor.num_nodes
        if ranks == 1:
            return 0.0
        inside = bytes_ * (ranks - 1) / ranks / (self.rates.link * BANDWIDTH_SHARE)
        # A node's GPUs fetch what lies on other nodes together.
        across = bytes_ * (nodes - 1) / nodes / (NETWORK * config.actor.num_gpus_per_node)
        return max(inside, across)


def time_plan(
    config: Config, asked: Question, engine: EngineMemory, cluster: Cluster, mean_prompt: float
) -> TimePlan | None:
    """None for a model whose layers are of another kind."""
    if asked.shape.decoder is None:
        return None
    running = at_once(config, engine, mean_prompt)
    phases = [_generation(config, asked, cluster, mean_prompt, running)]
    if config.algo.kl.init_coef:
        phases.append(_reference(config, asked, cluster, mean_prompt))
    phases.append(_training(config, asked, cluster, mean_prompt))
    update = _update(config, asked, cluster)
    phases += [update] if update.seconds else []
    phases.append(_sync(config, asked, cluster))
    return TimePlan(card=cluster.card, phases=tuple(phases), at_once=running)


def at_once(config: Config, engine: EngineMemory, prompt: float) -> int:
    """Rollouts that an engine writes at a time: by its flags, its share of the batch, and its cache."""
    k, response = config.rollout.n_samples_per_prompt, config.rollout.max_new_tokens
    shared = prompt / k if config.vllm.enable_prefix_caching else prompt
    by_cache = int(engine.cache_tokens / (shared + response))
    mine = ceil(config.samples_per_step / config.vllm.num_engines)
    return max(1, min(config.vllm.max_num_seqs or GPU_SEQUENCES, by_cache, mine))


def _generation(config: Config, asked: Question, cluster: Cluster, prompt: float, running: int) -> PhaseTime:
    """Passes of one token per running rollout, and the prompts once: weights and cache are read in every pass."""
    decoder, rates, width = asked.shape.decoder, cluster.rates, config.vllm.tensor_parallel_size
    assert decoder is not None
    k, response = config.rollout.n_samples_per_prompt, config.rollout.max_new_tokens
    mine = ceil(config.samples_per_step / config.vllm.num_engines)
    passes = max(1.0, mine / running) * response
    context = prompt + response / 2
    read = asked.shape.parameters * asked.itemsize / width + running * context * cache_bytes(config, asked)
    memory = read / (rates.bandwidth * BANDWIDTH_SHARE)
    one = decoder.forward(tokens=running, pairs=int(running * context), logits=running)
    compute = one / width / (rates.flops * TRAIN_SHARE[False])
    # Two sums over the workers per layer.
    sums = 2 * decoder.layers * running * decoder.hidden * asked.itemsize / (rates.link * BANDWIDTH_SHARE)
    per_pass = PASS_SECONDS + max(memory, compute) + (sums if width > 1 else 0.0)
    prompts = ceil(mine / (k if config.vllm.enable_prefix_caching else 1)) * prompt
    first = decoder.forward(tokens=int(prompts), pairs=int(prompts * prompt / 2), logits=0)
    seconds = passes * per_pass + first / width / (rates.flops * TRAIN_SHARE[False])
    parts = {"passes' own time": PASS_SECONDS, "memory": memory, "matrix products": compute}
    return PhaseTime(name="generation", seconds=seconds, bound=max(parts, key=lambda name: parts[name]))


def policy_flops(config: Config, asked: Question, prompt: float) -> int:
    """Of one forward pass over a step's rollouts: a prompt once per row that its rollouts are packed into."""
    decoder, k, response = asked.shape.decoder, config.rollout.n_samples_per_prompt, config.rollout.max_new_tokens
    assert decoder is not None
    rows, whole = rows_per_group(config, prompt), int(prompt)
    own = response * whole + response * (response + 1) // 2
    group = decoder.forward(
        tokens=rows * whole + k * response, pairs=rows * whole * (whole + 1) // 2 + k * own, logits=k * response
    )
    return config.rollout.batch_size * group


def rows_per_group(config: Config, prompt: float) -> int:
    """Packed rows that a prompt's rollouts are divided into."""
    fit = int((config.train.max_tokens_per_gpu - prompt) // config.rollout.max_new_tokens)
    return ceil(config.rollout.n_samples_per_prompt / max(1, min(config.rollouts_per_pass, fit)))


def _passes(config: Config, prompt: float) -> int:
    """Forward passes of a rank in a step and epoch."""
    together = max(1, config.rollouts_per_pass // config.rollout.n_samples_per_prompt)
    return ceil(config.rollout.batch_size * rows_per_group(config, prompt) / together / config.ranks)


def _training(config: Config, asked: Question, cluster: Cluster, prompt: float) -> PhaseTime:
    """Forward, backward of twice its operations, and under checkpointing the forward pass again."""
    times = 4 if config.actor.gradient_checkpointing_enable else 3
    flops = times * policy_flops(config, asked, prompt) / config.ranks
    compute = flops / (cluster.rates.flops * TRAIN_SHARE[asked.liger])
    whole = asked.shape.whole * asked.itemsize
    gathers = (2 if config.ds.zero_stage == 3 else 0) + 1  # parameters twice; gradients are reduced
    reduced = _passes(config, prompt) if config.ds.zero_stage >= 2 else 1
    share = asked.shape.trained / asked.shape.whole
    moved = whole * ((gathers - 1) * _passes(config, prompt) + reduced * share)
    links = cluster.gather(config, moved)
    seconds = config.train.max_epochs * max(compute, links)
    return PhaseTime(name="policy", seconds=seconds, bound="matrix products" if compute >= links else "links")


def _update(config: Config, asked: Question, cluster: Cluster) -> PhaseTime:
    """States on their way from and to CPU memory, or updated there."""
    states, moved = policy_states(config, asked.shape, asked.itemsize), 0.0
    if config.ds.enable_sleep and not config.ds.adam_offload:
        moved = 2 * (states.optimizer + (states.gradients if config.ds.zero_stage == 3 else 0)) / TO_HOST
    elif config.ds.adam_offload:
        mine = asked.shape.partition(config.ds.zero_stage, config.ranks)
        updates = max(config.samples_per_step // config.samples_per_update, 1) * config.train.max_epochs
        # Master, gradient and moments are read, and all but the gradient written.
        moved = updates * (28 * mine * config.actor.num_gpus_per_node / CPU_ADAM + 6 * mine / TO_HOST)
    return PhaseTime(name="optimizer", seconds=moved, bound="CPU memory")


def _reference(config: Config, asked: Question, cluster: Cluster, prompt: float) -> PhaseTime:
    ranks = config.reference_ranks or config.ranks
    flops = policy_flops(config, asked, prompt) / ranks
    seconds = flops / (cluster.rates.flops * TRAIN_SHARE[asked.liger])
    return PhaseTime(name="reference", seconds=seconds, bound="matrix products")


def _sync(config: Config, asked: Question, cluster: Cluster) -> PhaseTime:
    """All weights once: gathered under ZeRO 3, then to the engines."""
    size, backend = asked.shape.parameters * asked.itemsize, config.sync.backend
    gathered = cluster.gather(config, size) if config.ds.zero_stage == 3 else 0.0
    if backend == "gloo":
        speed, bound = GLOO_BANDWIDTH, "gloo"
    elif config.train.colocate_all:
        speed, bound = IPC_BANDWIDTH, "copies on the GPU"
    else:
        speed, bound = NETWORK, "network"
        if config.actor.num_nodes == 1 and config.vllm.num_engines * config.vllm.tensor_parallel_size <= 8:
            speed, bound = min(cluster.rates.link, NETWORK * 4) * BANDWIDTH_SHARE, "links"
    return PhaseTime(name="sync", seconds=gathered + size / speed, bound=bound)
