"""Which rank holds which expert: static rules, load balancers with and without replicas, and files of serving engines."""

from sim.placement.eplb import check_loads
from sim.placement.files import FORMATS, placement_text, read_placement
from sim.placement.rules import ROUND_ROBIN_BACKENDS, random_ranks, why_linear
from sim.placement.slots import Slots
from sim.placement.strategies import (
    ALIASES,
    STRATEGIES,
    Placement,
    balanced_slots,
    check_ep_size,
    check_slots,
    fixed_slots,
    is_load_aware,
    place,
    split_name,
    strategy_name,
)

__all__ = [
    "ALIASES",
    "FORMATS",
    "ROUND_ROBIN_BACKENDS",
    "STRATEGIES",
    "Placement",
    "Slots",
    "balanced_slots",
    "check_ep_size",
    "check_loads",
    "check_slots",
    "fixed_slots",
    "is_load_aware",
    "place",
    "placement_text",
    "random_ranks",
    "read_placement",
    "split_name",
    "strategy_name",
    "why_linear",
]
