"""One file per objective; the table below is where a run's `--real.objective` is looked up."""

from real_openrlhf.algo.objectives.base import Objective
from real_openrlhf.algo.objectives.real import RealObjective

__all__ = ["Objective", "RealObjective"]
