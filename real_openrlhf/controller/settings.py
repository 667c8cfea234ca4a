"""The controller's settings."""

from __future__ import annotations

from dataclasses import dataclass

from real_openrlhf.algo.sampling import Sampling
from real_openrlhf.controller.dynamic_sampling import Keep


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """
    total_steps        steps of the run; 0 evaluates and saves only
    batch_size         groups per step
    share_by           batch sizes are multiples of it, so that all policy and reference ranks get equally many groups
    sampling           how rollouts are sampled
    seed, seeded       seeded: every request gets a seed that is made from seed, step and wave
    keep, refill, max_refills   dynamic sampling, see `dynamic_sampling.collect`
    eval_steps         evaluate every n steps; -1: only before and after training
    eval_beside        the evaluator has its own engine: training goes on while it judges, until the next weight sync
    min_mass, min_readable   what the first rollouts must reach, see `first_look`
    renormalise        E[score] given that the score is on the scale
    n_samples          judgements of a logged step that go to samples.jsonl
    logging_steps      log every n steps
    dead_steps         stop after n steps in a row in which all advantages are zero; 0: never
    max_skipped        stop after n steps in a row whose update was skipped; 0: never
    one_ahead          sample the next batch while training on this one; its weights are then one version old
    """

    total_steps: int
    batch_size: int
    share_by: int
    sampling: Sampling
    seed: int
    seeded: bool
    keep: Keep
    refill: bool
    max_refills: int
    eval_steps: int
    min_mass: float
    min_readable: float
    dead_steps: int
    renormalise: bool
    n_samples: int
    logging_steps: int
    one_ahead: bool = False
    eval_beside: bool = False
    max_skipped: int = 0
