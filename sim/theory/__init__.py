"""Exact answers and bounds: what a simulation must agree with, and what lies below anything that it can see."""

from sim.theory.layer import UniformLayer
from sim.theory.tails import TINY, all_tails, fill_layer_bounds, join_layer_bounds, tails
from sim.theory.uniform import UniformRouter, spread_over_groups

__all__ = [
    "TINY",
    "UniformLayer",
    "UniformRouter",
    "all_tails",
    "fill_layer_bounds",
    "join_layer_bounds",
    "spread_over_groups",
    "tails",
]
