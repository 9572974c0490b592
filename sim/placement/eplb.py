"""EPLB, the load balancer that DeepSeek published and serving engines use: replicas for hot experts, packed on ranks.

The rule is that of `rebalance_experts` in https://github.com/deepseek-ai/EPLB at d52c72d. Where the number of nodes
divides the number of expert groups it is hierarchical: (1) whole groups are packed on nodes, (2) on each node the next
replica goes to the expert with the largest load per copy, (3) the slots of each node are packed on its ranks. Else the
same with one group and one node. Packing is greedy: the heaviest item first, each to the lightest pack with room. The
load of an expert splits evenly over its copies, and two copies may land on one rank. Ties go to the lowest index.

Upstream computes in float32 and sorts with an unstable sort, so ties and rounding may give other maps there, of the same
loads. On nodes that do not divide the ranks upstream fails; vLLM takes one node there, and so does this.
"""

from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.kernels import kernel
from sim.model import ModelSpec
from sim.placement.packing import pack, pack_slots
from sim.placement.refine import refine

_MOST_LOAD = 1e300  # per layer, so that sums are finite


@kernel
def _add_replicas(load, expert):
    """Fill the expert of each slot, int64 [slots]: each once, and further slots to the largest load per copy. Returns the
    copies of each expert, float64.
    """
    copies, share = np.ones(load.size), load.copy()
    for slot in range(expert.size):
        e = slot if slot < load.size else np.argmax(share)
        expert[slot] = e
        if slot >= load.size:
            copies[e] += 1
            share[e] = load[e] / copies[e]
    return copies


@kernel
def _balance_layer(load, n_group, n_nodes, ep_size, refined, phy2log):
    """One layer: load float64 [n_experts]; phy2log int16 [slots], the expert of each slot, rank by rank."""
    size, n_here, n_slots = load.size // n_group, load.size // n_nodes, phy2log.size // n_nodes
    group_load = np.zeros(n_group)
    for e in range(load.size):
        group_load[e // size] += load[e]
    node, place = np.empty(n_group, np.int64), np.empty(n_group, np.int64)
    pack(group_load, n_nodes, node, place)
    order = np.empty(load.size, np.int64)  # the experts node by node
    for g in range(n_group):
        first = node[g] * n_here + place[g] * size
        for i in range(size):
            order[first + i] = g * size + i
    slot = np.empty(n_slots, np.int64)
    for n in range(n_nodes):
        here = order[n * n_here : (n + 1) * n_here]
        load_here = load[here]
        copies = _add_replicas(load_here, slot)
        pack_slots(load_here / copies, ep_size // n_nodes, slot)
        if refined:
            refine(load_here, ep_size // n_nodes, slot)
        for s in range(n_slots):
            phy2log[n * n_slots + s] = here[slot[s]]


@kernel
def _balance_layers(loads, n_group, n_nodes, ep_size, refined, phy2log):
    for layer in range(loads.shape[0]):
        _balance_layer(loads[layer], n_group, n_nodes, ep_size, refined, phy2log[layer])


def balance(
    loads: np.ndarray, model: ModelSpec, ep_size: int, ranks_per_node: int, redundant: int, refined: bool
) -> np.ndarray:
    """Expert of each slot under EPLB, the slots rank by rank: int16 [layers, n_experts + redundant].

    loads float64 [layers, n_experts], checked before; the slots divide by ep_size; `refined` searches on from EPLB's map.
    """
    phy2log = np.empty((len(loads), model.n_experts + redundant), np.int16)
    n_group, n_nodes = _hierarchy(model, ep_size, ranks_per_node)
    _balance_layers(loads, n_group, n_nodes, ep_size, refined, phy2log)
    return phy2log


def _hierarchy(model: ModelSpec, ep_size: int, ranks_per_node: int) -> tuple[int, int]:
    """Groups and nodes that EPLB goes by: those of model and ranks if it can be hierarchical, else one of each."""
    n_nodes = -(-ep_size // ranks_per_node)
    fits = model.n_group % n_nodes == 0 and ep_size % n_nodes == 0
    return (model.n_group, n_nodes) if fits else (1, 1)


def check_loads(loads: Any, n_experts: int, where: str, layers: bool = False) -> np.ndarray:
    """Loads of experts as float64 [n_experts], or with `layers` [layers, n_experts].

    Raises
    ------
    InputError
        They are not numbers, not finite, negative, or of another shape.
    """
    try:
        table = np.asarray(loads)
    except ValueError:  # rows of different lengths
        raise InputError(f"{where}: layers must have the same number of experts") from None
    if table.dtype.kind not in "iuf":
        raise InputError(f"{where} must be numbers, not {shown(loads)}")
    shape = f"[layers, {n_experts}]" if layers else f"[{n_experts}], one number per expert"
    if table.ndim != 1 + layers or table.shape[-1] != n_experts or 0 in table.shape:
        raise InputError(f"{where} must have shape {shape}, not {list(table.shape)}")
    table = np.ascontiguousarray(table, np.float64)
    bad = np.argwhere(~(np.isfinite(table) & (table >= 0)))
    if len(bad):
        at = f"layer {bad[0][0]}, expert {bad[0][1]}" if layers else f"expert {bad[0][0]}"
        raise InputError(f"{where}: {at} is {table[tuple(bad[0])]}; loads must be finite and at least 0")
    if table.max() > _MOST_LOAD / n_experts:
        raise InputError(f"{where}: {table.max():g} is too large for a load")
    return table
