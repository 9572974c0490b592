"""Which rank holds which expert: static rules, load balancers with and without replicas, and files of serving engines."""

from sim.placement.eplb import check_loads
from sim.placement.files import FORMATS, placement_text, read_placement
from sim.placement.placement import Placement
from sim.placement.rules import ROUND_ROBIN_BACKENDS, random_ranks, why_linear
from sim.placement.strategies import (
    ALIASES,
    STRATEGIES,
    check_ep_size,
    check_slots,
    is_load_aware,
    place,
    place_balanced,
    place_fixed,
    split_name,
    strategy_name,
)

__all__ = [
    "ALIASES",
    "FORMATS",
    "ROUND_ROBIN_BACKENDS",
    "STRATEGIES",
    "Placement",
    "check_ep_size",
    "check_loads",
    "check_slots",
    "is_load_aware",
    "place",
    "place_balanced",
    "place_fixed",
    "placement_text",
    "random_ranks",
    "read_placement",
    "split_name",
    "strategy_name",
    "why_linear",
]
