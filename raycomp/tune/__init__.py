"""Ray Tune: a search space over a job's keys, a distributed job for each trial, and the Pareto front of the results."""

from raycomp.tune.driver import SweepResult, sweep

__all__ = ["SweepResult", "sweep"]
