"""Placements by name: what a strategy string means, and the slots that it gives."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown, unknown, whole_number
from sim.model import ModelSpec
from sim.placement.eplb import balance, check_loads
from sim.placement.files import read_placement
from sim.placement.placement import Placement
from sim.placement.rules import linear, linear_legacy, node_aware, random_ranks

STRATEGIES = {
    "linear": "contiguous blocks, the remainder spread over the first ranks (vLLM 0.33)",
    "linear_legacy": "contiguous blocks, the whole remainder on the last rank (vLLM 0.8.2, what PR #15517 set out to change)",
    "round_robin": "expert e on rank e % ep_size (vLLM); alias group_aware",
    "random": "one random permutation per layer draw, keyed by the seed, dealt in blocks like linear",
    "node_aware": "each node holds linear's block, dealt round robin over the node's ranks",
    "eplb": "load-aware: DeepSeek's EPLB, hierarchical where the nodes divide the expert groups, else global",
    "eplb_refined": "EPLB and a search on from its map: on the loads it is given never a heavier rank; takes milliseconds",
    "file:PATH": "ranks of experts (JSON: one row, or one per layer), or slots in a format of `epsim export`",
}
ALIASES = {"group_aware": "round_robin"}
LOAD_AWARE = ("eplb", "eplb_refined")
"""Strategies that need loads of experts."""
_STATIC = ("linear", "linear_legacy", "round_robin", "random", "node_aware")
_MOST_REDUNDANT = 2**15 - 1


def check_ep_size(model: ModelSpec, ep_size: Any) -> None:
    """Refuse an EP size that leaves ranks without experts."""
    if isinstance(ep_size, bool) or not isinstance(ep_size, int | np.integer) or not 1 <= ep_size <= model.n_experts:
        raise InputError(
            f"--ep {shown(ep_size)}: EP size must lie from 1 to the {model.n_experts} experts of {model.name}"
        )


def strategy_name(strategy: Any) -> str:
    """The strategy's own name, for a name or an alias, with its redundant slots if there are any; others are refused."""
    if not isinstance(strategy, str):
        raise InputError(f"--placement {shown(strategy)}: must be a name")
    if strategy.startswith("file:"):
        return strategy
    base, plus, number = strategy.partition("+")
    base = ALIASES.get(base, base)
    if base not in _STATIC + LOAD_AWARE:
        known = [*_STATIC, *LOAD_AWARE, *ALIASES]
        raise unknown("--placement", base if plus else strategy, known, " (or file:PATH)")
    if not plus:
        return base
    if not re.fullmatch("[0-9]{1,5}", number) or int(number) > _MOST_REDUNDANT:
        raise InputError(
            f"--placement {shown(strategy)}: redundant slots are a whole number up to {_MOST_REDUNDANT}, as in {base}+32"
        )
    if int(number) and base not in ("linear", *LOAD_AWARE):
        raise InputError(f"--placement {strategy}: redundant slots go with linear, eplb and eplb_refined")
    return f"{base}+{int(number)}" if int(number) else base


def split_name(name: str) -> tuple[str, int]:
    """Strategy and redundant slots of a name as `strategy_name` gives it."""
    if name.startswith("file:"):
        return name, 0
    base, _, number = name.partition("+")
    return base, int(number or 0)


def is_load_aware(name: str) -> bool:
    """Whether a strategy needs loads of experts."""
    return split_name(name)[0] in LOAD_AWARE


def check_slots(name: str, model: ModelSpec, ep_size: int) -> None:
    """Refuse slots that cannot be dealt in equal numbers where the strategy needs that."""
    base, redundant = split_name(name)
    if (redundant or base in LOAD_AWARE) and (model.n_experts + redundant) % ep_size:
        fit = [n for n in range(2 * ep_size) if (model.n_experts + n) % ep_size == 0]
        raise InputError(
            f"--placement {name} at --ep {ep_size}: {model.n_experts} experts + {redundant} redundant slots do not divide by "
            f"{ep_size} ranks; {base}+{fit[0] or fit[1]} does"
        )


def place(
    strategy: str,
    model: ModelSpec,
    ep_size: int,
    *,
    ranks_per_node: int = 8,
    loads: Any = None,
    redundant: int = 0,
    seed: int = 0,
) -> Placement:
    """Place the experts of a layer on `ep_size` ranks.

    Parameters
    ----------
    strategy : str
        A name of `STRATEGIES`, 'group_aware' for round_robin, or 'file:PATH'.
    model : ModelSpec
    ep_size : int
        1 to n_experts, divisible or not; with redundant slots, and for eplb, all slots must divide by it.
    ranks_per_node : int
        For node_aware and eplb; there are ceil(ep_size / ranks_per_node) nodes.
    loads : array [n_experts], optional
        Load of each expert, for eplb and eplb_refined, which need it; the others refuse it.
    redundant : int
        Slots beyond one per expert, for linear, eplb and eplb_refined: 'eplb' with redundant=32 is 'eplb+32'.
    seed : int
        For random: this is the permutation of the sweep's first layer draw.

    Raises
    ------
    InputError
        Unknown strategy, an EP size out of range, slots that do not divide by it, loads that are missing, of the wrong
        shape or not finite and non-negative, or a file that does not place every expert on these ranks.

    Notes
    -----
    round_robin spreads a group as evenly as can be (at most ceil(group / ep_size) of it on a rank), and up to
    ep_size = n_experts / (n_group - topk_group + 1) every choice of groups reaches every rank. node_aware keeps a token
    on at most topk_group nodes where the number of nodes divides n_group, and only there.
    """
    name = strategy_name(strategy)
    if whole_number("redundant", redundant, 0, _MOST_REDUNDANT):
        if split_name(name)[1] not in (0, redundant):
            raise InputError(f"--placement {strategy} has another number of redundant slots than redundant={redundant}")
        if name.startswith("file:"):
            raise InputError(f"--placement {strategy}: a file has its own redundant slots")
        name = strategy_name(f"{split_name(name)[0]}+{redundant}")
    check_ep_size(model, ep_size)
    whole_number("--ranks-per-node", ranks_per_node, 1, 2**15)
    whole_number("--seed", seed, 0, 2**63 - 1)
    if is_load_aware(name):
        if loads is None:
            raise InputError(f"--placement {name} needs the loads of the experts")
        table = check_loads(loads, model.n_experts, f"loads of {name}")
        return place_balanced(name, model, ep_size, ranks_per_node, table[None])
    if loads is not None:
        raise InputError(f"--placement {name} takes no loads: it does not depend on them; loads go with eplb")
    if name == "random":
        return Placement.of_ranks(name, int(ep_size), random_ranks(model.n_experts, ep_size, seed, 0, 1))
    return place_fixed(name, model, int(ep_size), ranks_per_node)


def place_balanced(name: str, model: ModelSpec, ep_size: int, ranks_per_node: int, loads: np.ndarray) -> Placement:
    """Layers under a load-aware strategy, of checked loads float64 [layers, n_experts]."""
    check_slots(name, model, ep_size)
    base, redundant = split_name(name)
    experts = balance(loads, model, ep_size, ranks_per_node, redundant, base == "eplb_refined")
    return Placement.of_slots(name, ep_size, model.n_experts, experts)


def place_fixed(name: str, model: ModelSpec, ep_size: int, ranks_per_node: int) -> Placement:
    """Layers under a strategy that is neither random nor load-aware: of one layer, or of all of a file's."""
    base, redundant = split_name(name)
    n_experts = model.n_experts
    if redundant:
        check_slots(name, model, ep_size)
        experts = (np.arange(n_experts + redundant) % n_experts).astype(np.int16)
        return Placement.of_slots(name, ep_size, n_experts, experts[None])
    if base.startswith("file:"):
        return read_placement(Path(base.removeprefix("file:")), n_experts, ep_size)
    if base == "linear":
        ranks = linear(n_experts, ep_size)
    elif base == "linear_legacy":
        ranks = linear_legacy(n_experts, ep_size)
    elif base == "round_robin":
        ranks = np.arange(n_experts, dtype=np.int32) % ep_size
    else:
        ranks = node_aware(n_experts, ep_size, ranks_per_node)
    return Placement.of_ranks(name, ep_size, ranks[None])
