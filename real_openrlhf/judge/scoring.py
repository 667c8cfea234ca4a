"""One-pass RAIL: feedback is generated once, and the distribution is read at the score position of that generation.

prompts ──► backend.generate ──► rollouts ──► readable? ── yes ──► Judgement
                  ▲                              │ no
                  └── response + forced anchor ◄─┘   (once; Judgement.forced)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from real_openrlhf.actors.engine.spec import request_seed
from real_openrlhf.algo.bound_scale import decode
from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.algo.score_position import ScoreReader
from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.score_stats import expected_score
from real_openrlhf.algo.types import Group, Rollout
from real_openrlhf.data.prompt import Prompt
from real_openrlhf.judge.types import JudgeBackend, Judgement, Score

MISSING_LABELS = "missing_labels"
# Tokens generated after the score's own, to see whether a label continues ("4" or "45").
_TAIL = 2


def score_prompts(
    backend: JudgeBackend,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    reader: ScoreReader,
    renormalise: bool = False,
    force: bool = True,
) -> list[list[Judgement]]:
    """sampling.n judgements per prompt, in the prompts' order.

    To a rollout without a readable score, the anchor is appended and the model continues it once, unless
    force is False; it stays invalid if even then no score can be read. With sampling.seed, the seed of each
    response is made from prompt.row and its number, so that batches do not matter.

    The backend needs room for `room_for_forcing` tokens more than sampling.max_new_tokens.
    """
    rollouts = [list(group.rollouts) for group in _generate(backend, prompts, sampling)]
    forced: dict[tuple[int, int], Rollout] = {}
    if force:
        unread = [(i, k) for i, row in enumerate(rollouts) for k, r in enumerate(row) if not r.reading.readable]
        forced = _force(backend, prompts, rollouts, unread, sampling, reader)
    return [
        [
            judgement(forced.get((i, k), rollout), reader, renormalise=renormalise, before=rollout)
            for k, rollout in enumerate(row)
        ]
        for i, row in enumerate(rollouts)
    ]


def score_given(
    backend: JudgeBackend,
    prompts: Sequence[Prompt],
    feedback: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    reader: ScoreReader,
    renormalise: bool = False,
    continues: bool = False,
) -> list[Judgement]:
    """The score of given feedback: one judgement per prompt, from a separate pass over prompt and feedback.

    feedback: for each prompt the ids up to the score token, the anchor included (`Judgement.feedback_ids`).
    continues: the backend has just generated this feedback and may use its prefix cache.
    This second pass (generate-then-rescore) is what `score_prompts` avoids; it is used to compare backends on the
    same ids.
    """
    given = [replace(prompt, given_ids=tuple(ids)) for prompt, ids in zip(prompts, feedback, strict=True)]
    tail = replace(sampling, n=1, max_new_tokens=_tail_length(reader), continues=continues)
    groups = _generate(backend, given, tail)
    return [judgement(group.rollouts[0], reader, renormalise=renormalise) for group in groups]


def judgement(
    rollout: Rollout, reader: ScoreReader, *, renormalise: bool = False, before: Rollout | None = None
) -> Judgement:
    """A rollout as a judgement. before: the rollout before the anchor was forced; the same rollout if none was."""
    scale, ids, reading = reader.bound.scale, rollout.token_ids.tolist(), rollout.reading
    free = rollout if before is None else before
    logprobs: tuple[float | None, ...] | None = None
    expected = mass = spread = None
    if reading.readable:
        row = rollout.score_rows.label_logprobs(rollout.score_logprobs)[0].double()
        logprobs = tuple(None if value != value else value for value in row.tolist())  # NaN: not returned
        if None not in logprobs:
            expected = float(expected_score(row, scale.tensor(), renormalise=renormalise))
            mass, spread = float(row.exp().sum()), entropy(row)
    return Judgement(
        token_ids=tuple(ids),
        text=rollout.text,
        feedback=_feedback(ids, rollout, reader),
        position=reading.position,
        reason=reading.reason,
        forced=free is not rollout,
        label_logprobs=logprobs,
        expected=expected,
        decoded=None if reading.label_index is None else scale.values[reading.label_index],
        mass=mass,
        entropy=spread,
        finish_reason=free.finish_reason,
        n_generated=len(free.token_ids),
    )


def entropy(label_logprobs: torch.Tensor) -> float:
    """[S] log-probs -> entropy in nats of the distribution given that the score is on the scale."""
    return float(torch.special.entr(label_logprobs.softmax(-1)).sum())


def average(judgements: Sequence[Judgement], scale: ScoreScale) -> Score:
    """Average-of-N: each value is the mean over the samples that have it; None if none has it."""
    read = [j.label_logprobs for j in judgements if j.label_logprobs is not None]
    distribution = logs = None
    if read:
        table = torch.tensor([[float("nan") if v is None else v for v in row] for row in read], dtype=torch.float64)
        logs = table.logsumexp(0) - torch.tensor(len(read), dtype=torch.float64).log()
        probabilities = [None if p != p else p for p in logs.exp().tolist()]
        distribution = dict(zip(scale.labels, probabilities))
    score = _mean(j.expected for j in judgements)
    first = judgements[0]
    return Score(
        score=score,
        decoded=_mean(j.decoded for j in judgements),
        distribution=distribution,
        mass=_mean(j.mass for j in judgements),
        entropy=None if logs is None or bool(logs.isnan().any()) else entropy(logs),
        feedback=first.feedback,
        reason=None if score is not None else MISSING_LABELS if read else first.reason,
        n_forced=sum(j.forced for j in judgements),
        n_invalid=sum(j.position is None for j in judgements),
        samples=tuple(judgements),
    )


def room_for_forcing(reader: ScoreReader) -> int:
    """How many tokens a forced anchor and the score after it may take, in addition to a response of full length."""
    return max(len(ids) for ids in _anchor_ids(reader)) + _tail_length(reader) + reader.bound.extra_tokens


# -- the forced anchor -----------------------------------------------------------------------------------


def _force(
    backend: JudgeBackend,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Sequence[Rollout]],
    unread: Sequence[tuple[int, int]],
    sampling: Sampling,
    reader: ScoreReader,
) -> dict[tuple[int, int], Rollout]:
    """(prompt, sample) -> the rollout continued after a forced anchor. Rollouts that cannot have one are left out."""
    jobs = [(i, k, with_anchor(rollouts[i][k].token_ids.tolist(), reader)) for i, k in unread]
    found: dict[tuple[int, int], Rollout] = {}
    # One call per sample number: seeds are made from the row and must differ between samples.
    for k in sorted({k for _, k, given in jobs if given is not None}):
        batch = [(i, given) for i, at, given in jobs if at == k and given is not None]
        seed = None if sampling.seed is None else request_seed(sampling.seed, -1, k)
        tail = replace(sampling, n=1, max_new_tokens=_tail_length(reader), seed=seed, continues=True)
        groups = _generate(backend, [replace(prompts[i], given_ids=given) for i, given in batch], tail)
        found |= {(i, k): group.rollouts[0] for (i, _), group in zip(batch, groups)}
    return found


def with_anchor(token_ids: Sequence[int], reader: ScoreReader) -> tuple[int, ...] | None:
    """The response up to its end of text, then the first anchor. None if the anchor's text would not be read there.

    If the response ends in an incomplete anchor, that is removed first.
    """
    end = next((i for i, token in enumerate(token_ids) if token in reader.end_ids), len(token_ids))
    body = _without_begun_anchor(list(token_ids[:end]), reader)
    prefix = reader.bound.anchors[0].prefix
    text = decode(reader.tokenizer, body)
    candidates = _anchor_ids(reader)
    if not text or text[-1].isspace():
        candidates = candidates[::-1]  # no space before the anchor
    for anchor in candidates:
        whole = decode(reader.tokenizer, [*body, *anchor])
        if whole.endswith(prefix):
            return (*body, *anchor)
    return None


def _anchor_ids(reader: ScoreReader) -> list[list[int]]:
    """The first anchor's ids before a label: first those with a space in front, then those without one."""
    anchor, label = reader.bound.anchors[0], reader.bound.scale.labels[0]
    found = []
    for space in (" ", ""):
        ids = reader.tokenizer.encode(space + anchor.text + label, add_special_tokens=False)
        lengths = [n for n in range(1, len(ids)) if decode(reader.tokenizer, ids[:n]) == space + anchor.prefix]
        if lengths:
            found.append(list(ids[: lengths[0]]))
    if not found:
        raise ValueError(f"the anchor {anchor.text!r} cannot be appended to a response: no tokens decode to it")
    return found


def _without_begun_anchor(body: list[int], reader: ScoreReader) -> list[int]:
    """The response without an anchor at its end, complete or incomplete; unchanged if no token ends right before it."""
    text = decode(reader.tokenizer, body).rstrip()
    for anchor in reader.bound.anchors:
        words = anchor.prefix.rstrip()
        # At least the anchor's first word must be there: a single letter at the end is no anchor.
        shortest = len(words.split(maxsplit=1)[0])
        for length in range(len(words), shortest - 1, -1):
            if text.endswith(words[:length]) and not text[:-length][-1:].isalnum():
                head = text[:-length].rstrip()
                for n in range(len(body), -1, -1):
                    if decode(reader.tokenizer, body[:n]).rstrip() == head:
                        return body[:n]
    return body


def _tail_length(reader: ScoreReader) -> int:
    return 1 + reader.bound.extra_tokens + _TAIL


# -- helpers ---------------------------------------------------------------------------------------------


def _generate(backend: JudgeBackend, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    if not prompts:
        return []
    groups = backend.generate(prompts, sampling)
    if [group.row for group in groups] != [p.row for p in prompts] or any(len(g) != sampling.n for g in groups):
        raise RuntimeError(
            f"{len(prompts)} prompts of {sampling.n} samples were sent, but other groups came back: {len(groups)}, of "
            f"{sorted({len(group) for group in groups})} rollouts, or in another order"
        )
    return groups


def _feedback(ids: list[int], rollout: Rollout, reader: ScoreReader) -> str:
    """The text before the anchor, without special tokens."""
    end = next((i for i, token in enumerate(ids) if token in reader.end_ids), len(ids))
    stop = end if rollout.reading.position is None else rollout.reading.position
    text = reader.tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if rollout.reading.anchor_index is not None and rollout.reading.position is not None:
        prefix = reader.bound.anchors[rollout.reading.anchor_index].prefix
        text = text.removesuffix(prefix)
    return text.strip()


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
