"""A look at the very first rollouts: are scores read where scores are written?

E[score] close to 0 with almost no mass on the scale means that the wrong tokens or the wrong
position are read. Training on that would be noise, so the run stops with advice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from real_openrlhf.algo.score_scale import ScoreScale
from real_openrlhf.algo.score_stats import expected_score
from real_openrlhf.algo.types import Group, count_reasons
from real_openrlhf.common.errors import RunError


class ScoresNotThere(RunError):
    """The first rollouts hold too few scores, or too little probability on the scale."""


def check_first_rollouts(
    groups: Sequence[Group],
    scale: ScoreScale,
    *,
    min_mass: float,
    min_readable: float,
    top_p: float,
    renormalise: bool = False,
    shown: int = 5,
) -> str:
    """A few lines for the log; raises ScoresNotThere below either threshold (mean mass, share of readable rollouts).

    Without a readable rollout there is no mass to check: with min_readable 0 such a run goes on.
    """
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    readable = [(g, r) for g, r in rollouts if r.reading.readable]
    share = len(readable) / len(rollouts)
    counted = {name: n for name, n in count_reasons(groups).items() if n}
    if share < min_readable:
        ends = "\n".join(f"  ...{r.text[-120:]!r}" for _, r in rollouts[:shown])
        raise ScoresNotThere(
            f"only {len(readable)} of the first {len(rollouts)} rollouts have a readable score ({counted}); "
            f"--real.min_readable asks for a share of {min_readable:g}. They end like this:\n{ends}\n"
            "Let the prompt ask for the anchor sentence, set --real.anchor to what the model writes, give more room "
            "(--rollout.max_new_tokens), or warm the model up on a few judgements first (real_openrlhf.train_warmup)."
        )
    if not readable:
        return f"first rollouts: none of {len(rollouts)} is readable, reasons {counted}"
    logprobs = torch.stack([r.score_rows.label_logprobs(r.score_logprobs)[0] for _, r in readable]).double()
    mass = logprobs.exp().sum(-1)
    expected = expected_score(logprobs, scale.tensor(), renormalise=renormalise)
    lines = [
        f"first rollouts: {share:.0%} readable, mean mass on the scale {float(mass.mean()):.3f}, reasons {counted}"
    ]
    for (group, rollout), e, m in list(zip(readable, expected.tolist(), mass.tolist()))[:shown]:
        written = None if rollout.reading.label_index is None else scale.labels[rollout.reading.label_index]
        lines.append(f"  label {group.label:g}  E[score] {e:.3f}  written {written}  mass {m:.3f}")
    report = "\n".join(lines)
    if float(mass.mean()) < min_mass:
        raise ScoresNotThere(
            f"{report}\nAlmost no probability is on the labels of {scale}: --real.min_mass asks for {min_mass:g}. "
            "The model writes other scores than the scale has, or another form of them; check --real.scale, "
            "--real.anchor and the prompt, or warm the model up first (real_openrlhf.train_warmup)."
        )
    if top_p < 1:
        report += (
            f"\n  top_p {top_p:g}: log-probs are over the full vocabulary, the rollouts were drawn from its nucleus"
        )
    return report
