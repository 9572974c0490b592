"""Exact answers and bounds: what a simulation must agree with, and what lies below anything that it can see."""

from sim.theory.grouped import spread_by_enumeration, spread_over_groups
from sim.theory.layer import UniformLayer
from sim.theory.plain import idle_ranks, max_load_of_one_token, mean_idle_ranks, one_rank
from sim.theory.sums import TINY, tails
from sim.theory.uniform import UniformRouter
from sim.theory.union import fill_layer_bounds

__all__ = [
    "TINY",
    "UniformLayer",
    "UniformRouter",
    "fill_layer_bounds",
    "idle_ranks",
    "max_load_of_one_token",
    "mean_idle_ranks",
    "one_rank",
    "spread_by_enumeration",
    "spread_over_groups",
    "tails",
]
