"""Exact answers and bounds: what a simulation must agree with, and what lies below anything that it can see."""

from sim.theory.drawn import DrawnLayers, tally_loads
from sim.theory.layer import UniformLayer
from sim.theory.rare import RareRow, RareTail, no_rare_events_because, rare_tail
from sim.theory.tails import TINY, TailsOfSums, tails
from sim.theory.uniform import UniformRouter, spread_over_groups

__all__ = [
    "TINY",
    "DrawnLayers",
    "RareRow",
    "RareTail",
    "TailsOfSums",
    "UniformLayer",
    "UniformRouter",
    "no_rare_events_because",
    "rare_tail",
    "spread_over_groups",
    "tails",
    "tally_loads",
]
