"""Which rank holds which expert: static rules, load balancers with and without replicas, and files of serving engines."""

from sim.placement.eplb import LayerCost, balance_budget, check_loads, spread_copies
from sim.placement.formats import FORMATS, how_to_load, placement_text, read_placement
from sim.placement.placement import Placement, decoder_layers, notes_on
from sim.placement.strategies import (
    ALIASES,
    BUDGET,
    LINEAR_BACKENDS,
    ROUND_ROBIN_BACKENDS,
    STRATEGIES,
    check_ep_size,
    check_slots,
    is_load_aware,
    most_slots,
    place,
    place_balanced,
    place_fixed,
    random_ranks,
    split_name,
    strategy_name,
    why_linear,
)

__all__ = [
    "ALIASES",
    "BUDGET",
    "FORMATS",
    "LINEAR_BACKENDS",
    "ROUND_ROBIN_BACKENDS",
    "STRATEGIES",
    "LayerCost",
    "Placement",
    "balance_budget",
    "check_ep_size",
    "check_loads",
    "check_slots",
    "decoder_layers",
    "how_to_load",
    "is_load_aware",
    "most_slots",
    "notes_on",
    "place",
    "place_balanced",
    "place_fixed",
    "placement_text",
    "random_ranks",
    "read_placement",
    "split_name",
    "spread_copies",
    "strategy_name",
    "why_linear",
]
