"""Memory of a run: what lies on each kind of GPU in each phase, and in the memory of the fullest node.

Terms are exact where they follow from shapes and flags (`states`), or where vLLM takes what it is told to take; the
others are estimates by the layers' formulas (`activations`), or were measured once on an H100.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from real_openrlhf.common.device import GPU_BATCHED_TOKENS, GPU_SEQUENCES
from real_openrlhf.config.schema import Config
from real_openrlhf.run.activations import Activations, PackedRow, activations
from real_openrlhf.run.model_shape import ModelShape
from real_openrlhf.run.states import States, policy_states

# CUDA context, NCCL and cuBLAS of a training process; an estimate.
POLICY_CONTEXT = 2_000_000_000
# One H100 (tests/gpu/results/h100/log_engine.txt): an engine takes this much beside its share, context and graphs, and
# keeps so much while it sleeps.
ENGINE_BESIDE = 1_800_000_000
ENGINE_ASLEEP = 2_300_000_000
# Python, torch and CUDA's libraries of one process in CPU memory; an estimate.
PROCESS = 3_000_000_000
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Term:
    """exact: it follows from shapes and flags; else it is an estimate."""

    name: str
    bytes: int
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Phase:
    name: str
    terms: tuple[Term, ...]

    @property
    def total(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def certain(self) -> int:
        return sum(term.bytes for term in self.terms if term.exact)

    def breaking(self, room: int) -> Term:
        """The term with which the sum passes `room`, in the order of the terms."""
        total = 0
        for term in self.terms:
            total += term.bytes
            if total > room:
                return term
        raise ValueError(f"{self.name} fits into {room} bytes")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A kind of GPU, by who lives on it. gpus: how many of them."""

    name: str
    gpus: int
    phases: tuple[Phase, ...]

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """One GPU of an engine, in bytes. cache_tokens: of the KV cache; needed: of the longest request."""

    share: int
    weights: int
    work: int
    cache_tokens: int
    needed: int

    @property
    def starts(self) -> bool:
        """vLLM refuses an engine whose cache does not hold one request of the longest."""
        return self.cache_tokens >= self.needed


# A warm-up without evaluation has none.
NO_ENGINE = EngineMemory(share=0, weights=0, work=0, cache_tokens=0, needed=0)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """card: bytes of a GPU. host: in CPU memory of the fullest node. known: activations are among the terms."""

    card: int
    parameters: int
    places: tuple[Place, ...]
    engine: EngineMemory
    host: tuple[Term, ...]
    known: bool

    @property
    def fits(self) -> bool:
        return self.engine.starts and all(place.fullest.total <= self.card for place in self.places)

    @property
    def may_fit(self) -> bool:
        """By the exact terms alone."""
        weights = self.engine.weights <= self.engine.share
        return weights and all(phase.certain <= self.card for place in self.places for phase in place.phases)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What memory is planned for.

    itemsize: bytes of a weight; card: bytes of a GPU; prompt: tokens of the longest; liger: the policy has its layers.
    """

    shape: ModelShape
    itemsize: int
    card: int
    prompt: int
    liger: bool


def memory_plan(config: Config, asked: Question) -> MemoryPlan:
    states = policy_states(config, asked.shape, asked.itemsize)
    engine = engine_memory(config, asked) if config.uses_engines else NO_ENGINE
    training = _training(config, asked, states)
    workers = config.vllm.num_engines * config.vllm.tensor_parallel_size
    if not config.uses_engines:
        places = [Place(name="policy", gpus=config.ranks, phases=training)]
    elif config.train.colocate_all:
        places = [Place(name="policy+rollout", gpus=workers, phases=_shared(config, states, engine, training))]
    else:
        sync = Phase(name="sync", terms=(*_held(config, states), *_sync(config, asked, states)))
        generation = Phase(name="generation", terms=_engine_terms(engine))
        places = [
            Place(name="policy", gpus=config.ranks, phases=(*training, sync)),
            Place(name="rollout", gpus=workers, phases=(generation,)),
        ]
    if config.reference_ranks:
        places.append(Place(name="reference", gpus=config.reference_ranks, phases=(_reference(config, asked),)))
    if config.eval.dataset and config.eval.engine == "own":
        phase = Phase(name="generation", terms=_engine_terms(engine))
        places.append(Place(name="evaluator", gpus=config.vllm.tensor_parallel_size, phases=(phase,)))
    return MemoryPlan(
        card=asked.card,
        parameters=asked.shape.parameters,
        places=tuple(places),
        engine=engine,
        host=_host(config, asked, states),
        known=asked.shape.decoder is not None,
    )


# -- the policy -----------------------------------------------------------------------------------------------------


def _held(config: Config, states: States) -> tuple[Term, ...]:
    """What the policy has on the GPU outside of its training; nothing of an optimizer that sleeps or never is there."""
    terms = [Term(name="weights", bytes=states.weights, exact=True)]
    if not (config.ds.adam_offload or config.ds.enable_sleep):
        # ZeRO 3 keeps the buffer of its gradients, the other stages free them.
        kept = states.gradients if config.ds.zero_stage == 3 else 0
        terms += [
            Term(name="gradients", bytes=kept, exact=True),
            Term(name="optimizer", bytes=states.optimizer, exact=True),
        ]
    return (*terms, Term(name="contexts", bytes=POLICY_CONTEXT))


def _training(config: Config, asked: Question, states: States) -> tuple[Phase, ...]:
    """Forward with the output layer, the output layer's backward, that of the layers, and the optimizer's step."""
    offload, three = config.ds.adam_offload, config.ds.zero_stage == 3
    row = PackedRow.of(config, asked.prompt)
    found = _activations(config, asked, row) or Activations(kept=0, layer=0, forward=0, backward=0)
    weights = Term(name="weights", bytes=states.weights, exact=True)
    # Of the rows before; ZeRO 3 has the buffer for it always.
    sums = 0 if offload or (row.last and not three) else states.gradients
    gradients = Term(name="gradients", bytes=0 if offload else states.gradients, exact=True)
    optimizer = Term(name="optimizer", bytes=0 if offload else states.optimizer, exact=True)
    rest = (Term(name="contexts", bytes=POLICY_CONTEXT), Term(name="gathered", bytes=states.gathered))
    kept = Term(name="activations", bytes=found.kept)
    before = (weights, replace(gradients, bytes=sums), optimizer, *rest)
    buckets = Term(name="buckets", bytes=states.buckets)

    def phase(name: str, *terms: Term) -> Phase:
        return Phase(name=name, terms=terms)

    return (
        phase(
            "forward",
            *before,
            replace(buckets, bytes=states.buckets if three else 0),
            kept,
            Term(name="logits", bytes=found.forward),
        ),
        phase("output layer", *before, buckets, kept, Term(name="logits", bytes=found.backward)),
        phase(
            "layers",
            *before,
            replace(buckets, bytes=states.buckets + states.reduced),
            kept,
            Term(name="one layer", bytes=found.layer),
        ),
        phase(
            "update",
            *(weights, gradients, optimizer, rest[0]),
            Term(name="copy of gradients", bytes=0 if offload else states.copy),
        ),
    )


def _activations(config: Config, asked: Question, row: PackedRow) -> Activations | None:
    return activations(
        config,
        asked.shape,
        row,
        itemsize=asked.itemsize,
        liger=asked.liger,
        logit_bytes=logit_bytes(config, asked.card),
    )


def logit_bytes(config: Config, card: int) -> int:
    """--real.logits_mb, or a tenth of the GPU (`Device.logits_mb`)."""
    return config.real.logits_mb * 2**20 if config.real.logits_mb else card // 10


def _sync(config: Config, asked: Question, states: States) -> tuple[Term, ...]:
    """Whole parameters of a bucket, and its flat buffers: two by NCCL and CUDA IPC, and a merged copy with LoRA."""
    largest = max(config.sync.bucket_mb * 2**20, asked.shape.largest_tensor * asked.itemsize)
    gathered = largest if states.gathered else 0
    merged = largest * (1 + 2 * _FP32 // asked.itemsize) if config.ds.lora.rank else 0
    return (Term(name="sync buffers", bytes=gathered + merged + 2 * largest),)


# -- engines --------------------------------------------------------------------------------------------------------


def engine_memory(config: Config, asked: Question) -> EngineMemory:
    width, decoder = config.vllm.tensor_parallel_size, asked.shape.decoder
    share = int(config.engine_utilisation * asked.card)
    weights = asked.shape.parameters * asked.itemsize // width
    needed = config.data.max_len
    if decoder is None:
        return EngineMemory(share=share, weights=weights, work=0, cache_tokens=needed, needed=needed)
    tokens = config.vllm.max_num_batched_tokens or GPU_BATCHED_TOKENS
    sequences = config.vllm.max_num_seqs or GPU_SEQUENCES
    # A layer's gate, up and product beside the hidden states; logits in fp32, their log-softmax and a copy.
    work = tokens * asked.itemsize * (3 * decoder.intermediate // width + 4 * decoder.hidden)
    work += 3 * _FP32 * min(sequences, tokens) * decoder.vocabulary
    per_token = cache_bytes(config, asked)
    return EngineMemory(
        share=share,
        weights=weights,
        work=work,
        cache_tokens=max(0, share - weights - work) // per_token,
        needed=needed,
    )


def cache_bytes(config: Config, asked: Question) -> int:
    """Of a token in the KV cache of one GPU: keys and values of all layers; a head at least on each."""
    decoder = asked.shape.decoder
    assert decoder is not None
    heads = max(1, decoder.kv_heads // config.vllm.tensor_parallel_size)
    return 2 * decoder.layers * heads * decoder.head_dim * asked.itemsize


def _engine_terms(engine: EngineMemory) -> tuple[Term, ...]:
    """vLLM fills its share: what weights and work leave is KV cache."""
    cache = max(0, engine.share - engine.weights - engine.work)
    return (
        Term(name="engine weights", bytes=engine.weights, exact=True),
        Term(name="engine work", bytes=engine.share - engine.weights - cache, exact=True),
        Term(name="KV cache", bytes=cache, exact=True),
        Term(name="graphs, context", bytes=ENGINE_BESIDE),
    )


def _shared(config: Config, states: States, engine: EngineMemory, training: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Policy and engine on one GPU. Engines that sleep keep little; those that do not keep everything."""
    asleep = (Term(name="sleeping engine", bytes=ENGINE_ASLEEP),)
    beside = asleep if config.vllm.enable_sleep else _engine_terms(engine)
    held = _held(config, states)
    # Weights wake before the sync, the KV cache after it.
    woken = (*asleep, Term(name="engine weights", bytes=engine.weights, exact=True))
    buckets = 2 * config.sync.bucket_mb * 2**20
    receiving = (Term(name="sync buffers", bytes=buckets + (buckets // 2 if states.gathered else 0)),)
    return (
        *(Phase(name=phase.name, terms=(*phase.terms, *beside)) for phase in training),
        Phase(name="sync", terms=(*held, *(woken if config.vllm.enable_sleep else beside), *receiving)),
        Phase(name="generation", terms=(*held, *_engine_terms(engine))),
    )


# -- the reference, and CPU memory ----------------------------------------------------------------------------------


def _reference(config: Config, asked: Question) -> Phase:
    shape, ranks = asked.shape, config.reference_ranks
    sharded = config.ds.zero_stage == 3
    weights = asked.itemsize * (-(-shape.parameters // ranks) if sharded else shape.parameters)
    whole = config.ref.offload or (sharded and ranks > 1)
    gathered = policy_states(config, shape, asked.itemsize).gathered if whole else 0
    found = _activations(config, asked, PackedRow.of(config, asked.prompt))
    return Phase(
        name="reference",
        terms=(
            Term(name="weights", bytes=0 if config.ref.offload else weights, exact=True),
            Term(name="contexts", bytes=POLICY_CONTEXT),
            Term(name="gathered", bytes=gathered),
            # Without gradients one layer's at a time.
            Term(name="one layer", bytes=0 if found is None else max(found.layer, found.forward)),
        ),
    )


def _host(config: Config, asked: Question, states: States) -> tuple[Term, ...]:
    """CPU memory of a node that holds as many policy ranks as one can; vLLM's level 2 of sleep keeps nothing there."""
    ranks, itemsize, terms = config.actor.num_gpus_per_node, asked.itemsize, []
    if config.ds.adam_offload:
        # Of the trained share: master, gradient and moments in fp32, and the sums of gradients, or new weights.
        mine = asked.shape.partition(config.ds.zero_stage, config.ranks)
        more = states.gradients if config.ds.zero_stage == 3 else mine * itemsize
        terms.append(Term(name="optimizer", bytes=ranks * (4 * _FP32 * mine + more), exact=True))
    elif config.ds.enable_sleep:
        grads = states.gradients if config.ds.zero_stage == 3 else 0
        terms.append(Term(name="sleeping optimizer", bytes=ranks * (states.optimizer + grads), exact=True))
    if config.reference_ranks and config.ref.offload:
        shards = asked.shape.parameters * itemsize * config.ref.num_gpus_per_node // config.reference_ranks
        terms.append(Term(name="reference", bytes=shards, exact=True))
    processes = ranks * (2 if config.train.colocate_all else 1)
    return (*terms, Term(name=f"{processes} processes", bytes=processes * PROCESS))


def host_bytes(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)
