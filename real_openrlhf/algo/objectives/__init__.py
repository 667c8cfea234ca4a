"""One file per objective. OBJECTIVES is the one list: flag, factory and model card derive from it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from real_openrlhf.algo.objectives.base import Objective

# Name -> module and class. As text: flags are parsed before torch is imported.
OBJECTIVES = {
    "real": "real_openrlhf.algo.objectives.real:RealObjective",
    "standard_rl": "real_openrlhf.algo.objectives.standard_rl:StandardRlObjective",
    "mse_rl": "real_openrlhf.algo.objectives.mse_rl:MseRlObjective",
    "jepo": "real_openrlhf.algo.objectives.jepo:JepoObjective",
    "term1_only": "real_openrlhf.algo.objectives.term1_only:Term1OnlyObjective",
    "term2_only": "real_openrlhf.algo.objectives.term2_only:Term2OnlyObjective",
    "sft": "real_openrlhf.algo.objectives.supervised:SftObjective",
    "raft": "real_openrlhf.algo.objectives.supervised:RaftObjective",
}
# Those that learn given responses (train_warmup); the others learn what the policy samples (train_real).
SUPERVISED = ("sft", "raft")
# Those whose reward is REAL's, r = -(E - y)^2 + lambda log p(y).
REAL_REWARD = ("real", "term1_only", "term2_only")


def objective_class(name: str) -> type[Any]:
    """The dataclass of an objective; its fields are the settings that it reads."""
    module, _, cls = OBJECTIVES[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), cls)
    return found


def make_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """The objective with those of the settings that it reads. KeyError where one of them is absent."""
    cls = objective_class(name)
    objective: Objective = cls(**{field.name: settings[field.name] for field in fields(cls)})
    return objective
