"""Budgets of copies: with the slots that `eplb+N` gives to all layers alike, more for the layers where they pay.

`eplb_budget+N` spends at most N redundant slots for each layer of a deployment, over all of its layers together. Within a layer
every rank has the same number of slots, so copies come one for each rank, while N may be any number. The next ones go to the
layer whose cost falls the most; where it falls only after several of them, all of these are taken at once. What is left when no
layer's cost falls any more is not spent. Each layer is then EPLB's with its number of slots.

The cost of a layer is what its ranks wait for. Where no GPU is known it is the load of the busiest rank, as a share of its
pairs, from the loads that the layers are fitted on: where times grow with loads, the step's time is that sum over its layers, and
a copy more costs the same in all of them. Where one is known it is the predicted time of the slowest rank.
"""

from collections.abc import Callable

import numpy as np

from sim.model import ModelSpec
from sim.placement.eplb import balance

LayerCost = Callable[[np.ndarray], np.ndarray]
"""Of the shares of a layer's pairs on its slots, float64 [layers, ranks, slots of a rank], the cost of each layer."""


def busiest_share(shares: np.ndarray) -> np.ndarray:
    """Share of a layer's pairs on the busiest rank, float64 [layers]; a LayerCost."""
    return shares.sum(axis=2).max(axis=1)


def most_copies(n_experts: int, ep_size: int, redundant: int) -> int:
    """Redundant slots that a layer gets at most: a second copy of every expert, or as many as all could get alike."""
    least = -n_experts % ep_size
    return least + (max(redundant, n_experts) - least) // ep_size * ep_size


def balance_budget(
    loads: np.ndarray,
    model: ModelSpec,
    ep_size: int,
    ranks_per_node: int,
    redundant: int,
    layer_cost: LayerCost | None = None,
    per_rank: int = 0,
) -> np.ndarray:
    """Expert of each slot of the layers of one deployment, int16 [layers, slots]: the slots rank by rank, -1 where a rank has
    fewer than in other layers, or than `per_rank`.

    loads float64 [layers, n_experts], checked before; with `redundant` slots more each layer can fill its ranks.
    """
    least, layer = -model.n_experts % ep_size, np.arange(len(loads))
    share = np.divide(loads, loads.sum(axis=1, keepdims=True), out=np.zeros_like(loads), where=loads > 0)
    maps, costs = [], []
    for copies in range(least, most_copies(model.n_experts, ep_size, redundant) + 1, ep_size):
        experts = balance(loads, model, ep_size, ranks_per_node, copies, False)
        held = np.zeros(loads.shape, np.int64)
        np.add.at(held, (layer[:, None], experts), 1)
        maps.append(experts.reshape(len(loads), ep_size, -1))
        costs.append((layer_cost or busiest_share)((share / held)[layer[:, None], experts].reshape(maps[-1].shape)))
    spent = spend(np.array(costs).T, (redundant - least) * len(loads) // ep_size)
    width = max(per_rank, *(maps[n].shape[2] for n in spent))
    slots = np.full((len(loads), ep_size, width), -1, np.int16)
    for row, n in enumerate(spent):
        slots[row, :, : maps[n].shape[2]] = maps[n][row]
    return slots.reshape(len(loads), -1)


def spend(costs: np.ndarray, budget: int) -> np.ndarray:
    """Units of a budget that each layer gets, int64 [layers], greedily: `costs` float64 [layers, units], with none, one, ..."""
    spent = np.zeros(len(costs), np.int64)
    rates, units = np.zeros(len(costs)), np.zeros(len(costs), np.int64)  # of the best next purchase of each layer
    stale = np.ones(len(costs), bool)
    while True:
        for layer in np.flatnonzero(stale | (units > budget)):
            falls = costs[layer, spent[layer]] - costs[layer, spent[layer] + 1 : spent[layer] + 1 + budget]
            rate = falls / np.arange(1, len(falls) + 1)
            units[layer] = rate.argmax() + 1 if len(rate) else 0
            rates[layer] = rate.max(initial=0.0)
        best = int(rates.argmax())
        if rates[best] <= 1e-12 * costs[best, 0]:
            return spent
        spent[best] += units[best]
        budget -= int(units[best])
        stale[:] = False
        stale[best] = True
