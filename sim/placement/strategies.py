"""Placements by name: what a strategy string means, the static rules of serving engines, and the slots that a name gives."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown, unknown, whole_number
from sim.model import ModelSpec, load_model
from sim.placement.eplb import LayerCost, balance, balance_budget, check_loads, most_copies
from sim.placement.formats import read_placement
from sim.placement.placement import LayerIds, Placement
from sim.streams import PERMUTATION, stream_key, words

STRATEGIES = {
    "linear": "contiguous blocks, the remainder spread over the first ranks (vLLM 0.33)",
    "linear_legacy": "contiguous blocks, the whole remainder on the last rank (vLLM 0.8.2, what PR #15517 set out to change)",
    "round_robin": "expert e on rank e % ep_size (vLLM); alias group_aware",
    "random": "one random permutation per layer draw, keyed by the seed, in blocks like linear",
    "node_aware": "each node holds linear's block, round robin over the node's ranks",
    "eplb": "load-aware: DeepSeek's EPLB, hierarchical where the nodes divide the expert groups, else global",
    "eplb_budget": "EPLB with N slots for each layer in the mean, as eplb_budget+N, spent over all layers where they pay",
    "eplb_refined": "EPLB and a search on from its map: on the loads it is given never a heavier rank; takes milliseconds",
    "file:PATH": "ranks of experts (JSON: one row, or one per layer), or slots in a format of `epsim export`",
}
ALIASES = {"group_aware": "round_robin"}
BUDGET = "eplb_budget"
LOAD_AWARE = ("eplb", "eplb_refined", BUDGET)
"""Strategies that need loads of experts."""
_STATIC = ("linear", "linear_legacy", "round_robin", "random", "node_aware")
_WITH_COPIES = ("linear", *LOAD_AWARE)
_MOST_REDUNDANT = 2**15 - 1


def check_ep_size(model: ModelSpec, ep_size: Any, placements: Iterable[str] = (), parameter: str = "ep_size") -> None:
    """Refuse an EP size that leaves ranks without experts: more ranks than experts need redundant slots that fill them.

    placements: names as `strategy_name` gives them. Which of them fill the ranks is up to `check_slots`.
    """
    if isinstance(ep_size, bool) or not isinstance(ep_size, int | np.integer):
        raise InputError(f"`{parameter}` {ep_size!r:.80}: must be a whole number")
    redundant = max(
        (_MOST_REDUNDANT if name.startswith("file:") else split_name(name)[1] for name in placements), default=0
    )
    if 1 <= ep_size <= model.n_experts + redundant:
        return
    missing = int(ep_size) - model.n_experts
    slots = f" and {redundant} redundant slots" if redundant else ""
    more = (
        f"; so many ranks need redundant slots that fill them, as in eplb+{missing}"
        if 0 < missing <= _MOST_REDUNDANT
        else ""
    )
    raise InputError(
        f"`{parameter}` {shown(ep_size)}: EP size must lie from 1 to the {model.n_experts} experts of {model.name}{slots}{more}"
    )


def strategy_name(strategy: Any, parameter: str = "strategy") -> str:
    """The strategy's own name, for a name or an alias, with its redundant slots if there are any; others are refused."""
    if not isinstance(strategy, str):
        raise InputError(f"`{parameter}` {shown(strategy)}: must be a name")
    if strategy.startswith("file:"):
        return strategy
    base, plus, number = strategy.partition("+")
    base = ALIASES.get(base, base)
    if base not in _STATIC + LOAD_AWARE:
        known = [*_STATIC, *LOAD_AWARE, *ALIASES]
        raise unknown(f"`{parameter}`", base if plus else strategy, known, " (or file:PATH)")
    if base == BUDGET and not number.strip("0"):
        raise InputError(f"`{parameter}` {strategy}: needs redundant slots that it can spend, as in {BUDGET}+32")
    if not plus:
        return base
    if not re.fullmatch("[0-9]{1,5}", number) or int(number) > _MOST_REDUNDANT:
        raise InputError(
            f"`{parameter}` {shown(strategy)}: redundant slots are a whole number up to {_MOST_REDUNDANT}, as in {base}+32"
        )
    if int(number) and base not in _WITH_COPIES:
        raise InputError(f"`{parameter}` {strategy}: redundant slots go with {', '.join(_WITH_COPIES)}")
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


def most_slots(name: str, n_experts: int, ep_size: int) -> int:
    """Slots that a layer has at most under a strategy's name; a budget may give a layer more than the mean."""
    base, redundant = split_name(name)
    return n_experts + (most_copies(n_experts, ep_size, redundant) if base == BUDGET else redundant)


def check_slots(name: str, model: ModelSpec, ep_size: int) -> None:
    """Refuse slots that do not fill the ranks, or not in equal numbers where the strategy needs that. A file is checked when
    it is read.
    """
    base, redundant = split_name(name)
    if base.startswith("file:"):
        return
    slots = model.n_experts + redundant
    if base == BUDGET and slots >= model.n_experts + -model.n_experts % ep_size:
        return  # its layers have as many as divide
    if ep_size > slots or ((redundant or base in LOAD_AWARE) and slots % ep_size):
        enough = max(ep_size, model.n_experts + 1)
        fitting = -(-enough // ep_size) * ep_size - model.n_experts
        raise InputError(
            f"`strategy` {name} at `ep_size` {ep_size}: {model.n_experts} experts + {redundant} redundant slots do not "
            f"{'fill' if ep_size > slots else 'divide by'} {ep_size} ranks; "
            f"{base if base in _WITH_COPIES else 'eplb'}+{fitting} does"
        )


def place(
    strategy: str,
    model: str | Path | ModelSpec,
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
    model : str, Path or ModelSpec
        As `load_model` takes it, or its value.
    ep_size : int
        1 to n_experts, divisible or not; with redundant slots, and for eplb, all slots must divide by it, and there may be
        as many ranks as slots: 'eplb+64' on 320 ranks is DeepSeek's deployment for decoding.
    ranks_per_node : int
        For node_aware and eplb; there are ceil(ep_size / ranks_per_node) nodes.
    loads : float array [n_experts], optional
        Load of each expert in any unit, for the load-aware strategies (eplb, eplb_refined, eplb_budget), which need it; the
        others refuse it.
    redundant : int
        Slots beyond one per expert, for linear and the load-aware strategies: 'eplb' with redundant=32 is 'eplb+32'.
    seed : int
        For random: this is the permutation of the sweep's first layer draw.

    Returns
    -------
    Placement
        Of one layer, or of all layers of a file that has a row for each.

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

    Examples
    --------
    >>> from sim import place
    >>> place("round_robin", "deepseek-v3", 64).rank_of_expert[62:66].tolist()
    [62, 63, 0, 1]
    """
    model = load_model(model)
    name = strategy_name(strategy)
    if whole_number("`redundant`", redundant, 0, _MOST_REDUNDANT):
        if split_name(name)[1] not in (0, redundant):
            raise InputError(f"`strategy` {strategy} has another number of redundant slots than redundant={redundant}")
        if name.startswith("file:"):
            raise InputError(f"`strategy` {strategy}: a file has its own redundant slots")
        name = strategy_name(f"{split_name(name)[0]}+{redundant}")
    check_ep_size(model, ep_size, [name])
    check_slots(name, model, ep_size)
    whole_number("`ranks_per_node`", ranks_per_node, 1, 2**15)
    whole_number("`seed`", seed, 0, 2**63 - 1)
    if is_load_aware(name):
        if loads is None:
            raise InputError(f"`strategy` {name} needs `loads`, the load of each expert")
        table = check_loads(loads, model.n_experts, f"`loads` of {name}")
        return place_balanced(name, model, ep_size, ranks_per_node, table[None])
    if loads is not None:
        raise InputError(f"`strategy` {name} takes no `loads`: it does not depend on them; they go with eplb")
    if name == "random":
        return Placement.of_ranks(name, int(ep_size), random_ranks(model.n_experts, ep_size, seed, 0, 1))
    return place_fixed(name, model, int(ep_size), ranks_per_node)


def place_balanced(
    name: str,
    model: ModelSpec,
    ep_size: int,
    ranks_per_node: int,
    loads: np.ndarray,
    layer_ids: LayerIds = None,
    layer_cost: LayerCost | None = None,
) -> Placement:
    """Layers under a load-aware strategy, of checked loads float64 [layers, n_experts], and perhaps their decoder layers. Under a
    budget they are the layers of one deployment, and their costs decide (default: the load of the busiest rank).
    """
    check_slots(name, model, ep_size)
    base, redundant = split_name(name)
    if base == BUDGET:
        experts = balance_budget(loads, model, ep_size, ranks_per_node, redundant, layer_cost)
    else:
        experts = balance(loads, model, ep_size, ranks_per_node, redundant, base == "eplb_refined")
    return Placement.of_slots(name, ep_size, model.n_experts, experts, layer_ids)


def place_fixed(name: str, model: ModelSpec, ep_size: int, ranks_per_node: int) -> Placement:
    """Layers under a strategy that is neither random nor load-aware: of one layer, or of all of a file's."""
    check_slots(name, model, ep_size)
    base, redundant = split_name(name)
    n_experts = model.n_experts
    if redundant:
        experts = (np.arange(n_experts + redundant) % n_experts).astype(np.int16)
        return Placement.of_slots(name, ep_size, n_experts, experts[None])
    if base.startswith("file:"):
        return read_placement(Path(base.removeprefix("file:")), model, ep_size)
    if base == "linear":
        ranks = linear(n_experts, ep_size)
    elif base == "linear_legacy":
        ranks = linear_legacy(n_experts, ep_size)
    elif base == "round_robin":
        ranks = np.arange(n_experts, dtype=np.int32) % ep_size
    else:
        ranks = node_aware(n_experts, ep_size, ranks_per_node)
    return Placement.of_ranks(name, ep_size, ranks[None])


def place_layers(
    name: str,
    model: ModelSpec,
    ep_size: int,
    ranks_per_node: int,
    *,
    loads: np.ndarray | None = None,
    loads_of: tuple[int, ...] = (),
    layer_cost: LayerCost | None = None,
    layers: int | None = None,
    first_layer: int | None = None,
) -> Placement:
    """A placement with a row for each layer, and the decoder layers that these are: the model's MoE layers where it knows them.

    Load-aware ones are of checked `loads`, float64 [layers, n_experts], of the layers `loads_of`; `layers` is how many layers a
    placement of one row is for (default: the model's), `first_layer` the decoder layer of the first.
    """
    check_ep_size(model, ep_size, [name])
    check_slots(name, model, ep_size)
    if name == "random":
        raise InputError("`placement` random: is drawn anew for each layer draw; there is none to export")
    moe = model.moe_layer_ids
    if loads is None:
        placement = place_fixed(name, model, ep_size, ranks_per_node)
    else:
        ids = moe if len(loads) == len(moe) else loads_of if set(loads_of) <= set(moe) else None
        placement = place_balanced(name, model, ep_size, ranks_per_node, loads, ids, layer_cost)
    n_rows = placement.n_rows
    if layers is not None and (n_rows > 1 or loads is not None):
        raise InputError(f"`layers` goes with placements that are not fitted, of one layer: {name} has {n_rows}")
    if n_rows == 1 and loads is None:
        n_rows = layers or model.n_moe_layers or 0
        if not n_rows:
            raise InputError(f"`layers` is needed: {model.name} does not say how many MoE layers it has")
    if first_layer is not None:
        return placement.for_layers(tuple(range(first_layer, first_layer + n_rows)))
    return placement.for_layers(placement.layer_ids or (moe if len(moe) == n_rows else tuple(range(n_rows))))


@lru_cache(maxsize=4)  # all EP sizes of a chunk ask for the same
def _random_places(n_experts: int, seed: int, first_draw: int, n_draws: int) -> np.ndarray:
    """Place of each expert in one random permutation per layer draw, int64 [n_draws, n_experts]."""
    drawn = words(stream_key(seed, "placement"), PERMUTATION, 0, (n_draws, n_experts), first_draw)
    return np.argsort(np.argsort(drawn, axis=1, kind="stable"), axis=1)


def random_ranks(n_experts: int, ep_size: int, seed: int, first_draw: int, n_draws: int) -> np.ndarray:
    """Rank of each expert under random placement, int32 [n_draws, n_experts]: one permutation per draw, in blocks like linear."""
    return linear(n_experts, ep_size)[_random_places(n_experts, seed, first_draw, n_draws)]


def linear(n_experts: int, ep_size: int) -> np.ndarray:
    """vLLM 0.33 `determine_expert_map`: the first E % R ranks hold one expert more."""
    q, m = divmod(n_experts, ep_size)
    return np.repeat(np.arange(ep_size, dtype=np.int32), [q + (r < m) for r in range(ep_size)])


def linear_legacy(n_experts: int, ep_size: int) -> np.ndarray:
    """vLLM 0.8.2: the last rank holds E // R + E % R."""
    return np.minimum(np.arange(n_experts, dtype=np.int32) // (n_experts // ep_size), np.int32(ep_size - 1))


def node_aware(n_experts: int, ep_size: int, ranks_per_node: int) -> np.ndarray:
    """Each node holds the block that `linear` gives its ranks, taken in turn by them."""
    ranks = linear(n_experts, ep_size)
    for first in range(0, ep_size, ranks_per_node):
        n_ranks = min(ranks_per_node, ep_size - first)
        block = np.flatnonzero((ranks >= first) & (ranks < first + n_ranks))
        ranks[block] = first + np.arange(block.size, dtype=np.int32) % n_ranks
    return ranks


ROUND_ROBIN_BACKENDS = ("deepep_low_latency", "nixl_ep")
"""All2all backends on which vLLM 0.33 keeps round_robin under data, prefill context or sequence parallelism."""
LINEAR_BACKENDS = (
    "allgather_reducescatter",
    "deepep_high_throughput",
    "deepep_v2",
    "mori_high_throughput",
    "mori_low_latency",
    "flashinfer_nvlink_one_sided",
    "flashinfer_nvlink_two_sided",
)
"""Other backends of vLLM 0.33, the default first: there it falls back to linear. moonep refuses round_robin."""


def why_linear(model: ModelSpec, ep_size: int, backend: str = "", parallel_ranks: int = 1) -> str:
    """Why vLLM 0.33 falls back to linear where round_robin is asked for, with a warning in its log; empty if it does not.

    It also does so with redundant experts and with EPLB (`determine_expert_placement_strategy`,
    model_executor/layers/fused_moe/expert_map_manager.py). The all2all backend, '' where it is not known, matters where there are
    several ranks of data, prefill context or sequence parallelism (`use_all2all_kernels`).
    """
    if not model.is_grouped:
        return f"the router of {model.name} has no expert groups (n_group = 1)"
    if ep_size == 1:
        return "the EP size is 1"
    if backend and parallel_ranks > 1 and backend not in ROUND_ROBIN_BACKENDS:
        runs_with = " or ".join(ROUND_ROBIN_BACKENDS)
        return f"there is data parallelism ({parallel_ranks} ranks) on {backend}; it would run with {runs_with}"
    return ""
