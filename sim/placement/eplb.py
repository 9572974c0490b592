"""EPLB, the load balancer that DeepSeek published and serving engines use: replicas for hot experts, packed on ranks.

The rule is that of `rebalance_experts` in https://github.com/deepseek-ai/EPLB at d52c72d. Where the number of nodes
divides the number of expert groups it is hierarchical: (1) whole groups are packed on nodes, (2) on each node the next
replica goes to the expert with the largest load per copy, (3) the slots of each node are packed on its ranks. Else the
same with one group and one node. Packing is greedy: the heaviest item first, each to the lightest pack with room. The
load of an expert splits evenly over its copies, and two copies may land on one rank. Ties go to the lowest index.

Upstream computes in float32, and so does this: of packs whose loads differ by less, the lowest takes the item. Its sort is
unstable, so ties may give other maps there, of the same loads. On nodes that do not divide the ranks upstream fails; vLLM
takes one node there, and so does this.

`eplb_refined` searches on from EPLB's map, in float64. EPLB gives replicas out without a look at how the slots will pack. Here
one replica is taken from an expert that misses it least and given to one of the hottest, the slots are packed again, and the
best of these changes is kept, as long as the heaviest rank gets lighter, or, at the same weight of it, the loads more even.
The result is never heavier than EPLB's.

`eplb_budget+N` spends at most N redundant slots for each layer of a deployment, over all of its layers together. Within a layer
every rank has the same number of slots, so copies come one for each rank, while N may be any number. The next ones go to the
layer whose cost falls the most; where it falls only after several of them, all of these are taken at once. What is left when no
layer's cost falls any more is not spent. Each layer is then EPLB's with its number of slots. The cost of a layer is what its
ranks wait for: where no GPU is known the share of its pairs on the busiest rank, else the predicted time of the slowest rank.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.kernels import kernel
from sim.model import ModelSpec
from sim.placement.placement import Placement

_MOST_LOAD = 1e37  # per layer, so that sums are finite in float32
_CANDIDATES = 4  # experts on each side of a change
_LEAST_GAIN = 1e-9  # of the largest load
LayerCost = Callable[[np.ndarray], np.ndarray]
"""Of the shares of a layer's pairs on its slots, float64 [layers, ranks, slots of a rank], the cost of each layer."""


@kernel
def pack(load, n_packs, pack, place):
    """Pack items of `load` float [items] in packs of equal numbers, the heaviest first, each in the lightest pack with room:
    pack and place in it, int64 [items]. Packs are added up in the type of `load`.

    As many packs as items: each its own, in order, as upstream does.
    """
    if load.size == n_packs:
        for i in range(load.size):
            pack[i], place[i] = i, 0
        return
    total, held = np.zeros(n_packs, load.dtype), np.zeros(n_packs, np.int64)
    for i in np.argsort(-load, kind="mergesort"):
        lightest = -1
        for p in range(n_packs):
            if held[p] < load.size // n_packs and (lightest < 0 or total[p] < total[lightest]):
                lightest = p
        pack[i], place[i] = lightest, held[lightest]
        total[lightest] += load[i]
        held[lightest] += 1


@kernel
def pack_slots(share, n_ranks, expert):
    """Reorder the experts of slots, int64 [slots], so that they lie rank by rank; share float [experts], the load of one
    copy.
    """
    rank, place = np.empty(expert.size, np.int64), np.empty(expert.size, np.int64)
    pack(share[expert], n_ranks, rank, place)
    packed, per_rank = np.empty_like(expert), expert.size // n_ranks
    for slot in range(expert.size):
        packed[rank[slot] * per_rank + place[slot]] = expert[slot]
    expert[:] = packed


@kernel
def _add_replicas(load, expert):
    """Fill the expert of each slot, int64 [slots]: each once, and further slots to the largest load per copy. Returns the
    copies of each expert; it and load are float32.
    """
    copies, share = np.ones(load.size, np.float32), load.copy()
    for slot in range(expert.size):
        e = slot if slot < load.size else np.argmax(share)
        expert[slot] = e
        if slot >= load.size:
            copies[e] += 1
            share[e] = load[e] / copies[e]
    return copies


@kernel
def _fill_loads(share, expert, load):
    """Load of each rank, float64 [ranks], of slots that lie rank by rank."""
    load[:] = 0.0
    for s in range(expert.size):
        load[s // (expert.size // load.size)] += share[expert[s]]


@kernel
def _swap_slots(share, expert, load):
    """Exchange a slot of the heaviest rank with a lighter one elsewhere, as long as both ranks end below it."""
    per_rank = expert.size // load.size
    while True:
        heaviest = np.argmax(load)
        least, mine, theirs = load[heaviest] * (1 - _LEAST_GAIN), -1, -1
        for s in range(heaviest * per_rank, (heaviest + 1) * per_rank):
            for t in range(expert.size):
                moved = share[expert[s]] - share[expert[t]]
                after = max(load[heaviest] - moved, load[t // per_rank] + moved)
                if moved > 0 and after < least:  # inside the rank itself `after` is above
                    least, mine, theirs = after, s, t
        if mine < 0:
            return
        moved = share[expert[mine]] - share[expert[theirs]]
        load[heaviest] -= moved
        load[theirs // per_rank] += moved
        expert[mine], expert[theirs] = expert[theirs], expert[mine]


@kernel
def _try_change(total, copies, giver, taker, expert, trial, load):
    """Give one replica of an expert to another, and fill `trial` int64 [slots] and `load` float64 [ranks] with the outcome."""
    share = total / copies
    share[giver] = total[giver] / (copies[giver] - 1)
    share[taker] = total[taker] / (copies[taker] + 1)
    trial[:] = expert
    for s in range(trial.size):
        if trial[s] == giver:
            trial[s] = taker
            break
    pack_slots(share, load.size, trial)
    _fill_loads(share, trial, load)
    _swap_slots(share, trial, load)


@kernel
def _is_lighter(load, than):
    """Whether the heaviest rank is lighter; of equally heavy ones, whether the squares of all loads add up to less."""
    heaviest, limit = load.max(), than.max()
    if abs(heaviest - limit) > _LEAST_GAIN * limit:
        return heaviest < limit
    return (load * load).sum() < (than * than).sum() * (1 - _LEAST_GAIN)


@kernel
def _best_change(total, copies, expert, load, best):
    """Try the changes between candidates; `load` float64 [ranks] and `best` int64 [slots] take the lightest outcome, if it
    is lighter than `load`. Returns its giver and taker, -1 without any.
    """
    trial, new_load = np.empty_like(expert), np.empty_like(load)
    missed = np.full(total.size, np.inf)  # load per copy without one of them
    for e in range(total.size):
        if copies[e] > 1:
            missed[e] = total[e] / (copies[e] - 1)
    givers = np.argsort(missed, kind="mergesort")[:_CANDIDATES]
    takers = np.argsort(-total / copies, kind="mergesort")[:_CANDIDATES]
    from_, to = -1, -1
    for giver in givers:
        for taker in takers:
            if copies[giver] > 1 and giver != taker:
                _try_change(total, copies, giver, taker, expert, trial, new_load)
                if _is_lighter(new_load, load):
                    from_, to = giver, taker
                    best[:], load[:] = trial, new_load
    return from_, to


@kernel
def refine(total, n_ranks, expert):
    """Improve the experts of slots, int64 [slots], rank by rank, of experts with loads `total` float64 [experts]."""
    copies, load, best = np.zeros(total.size), np.zeros(n_ranks), np.empty_like(expert)
    for s in range(expert.size):
        copies[expert[s]] += 1
    share = total / copies
    _fill_loads(share, expert, load)
    _swap_slots(share, expert, load)
    while expert.size > total.size:
        giver, taker = _best_change(total, copies, expert, load, best)
        if giver < 0:
            return
        copies[giver] -= 1
        copies[taker] += 1
        expert[:] = best


@kernel
def _balance_layer(load, group_load, n_nodes, ep_size, refined, phy2log):
    """One layer: load float64 [n_experts]; group_load float32 [groups]; phy2log int16 [slots], the expert of each slot, rank
    by rank.
    """
    n_group = group_load.size
    size, n_here, n_slots = load.size // n_group, load.size // n_nodes, phy2log.size // n_nodes
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
        light = load[here].astype(np.float32)
        copies = _add_replicas(light, slot)
        pack_slots(light / copies, ep_size // n_nodes, slot)
        if refined:
            refine(load[here], ep_size // n_nodes, slot)
        for s in range(n_slots):
            phy2log[n * n_slots + s] = here[slot[s]]


@kernel
def _balance_layers(loads, group_loads, n_nodes, ep_size, refined, phy2log):
    for layer in range(loads.shape[0]):
        _balance_layer(loads[layer], group_loads[layer], n_nodes, ep_size, refined, phy2log[layer])


def balance(
    loads: np.ndarray, model: ModelSpec, ep_size: int, ranks_per_node: int, redundant: int, refined: bool
) -> np.ndarray:
    """Expert of each slot under EPLB, the slots rank by rank: int16 [layers, n_experts + redundant].

    loads float64 [layers, n_experts], checked before; the slots divide by ep_size; `refined` searches on from EPLB's map.
    """
    phy2log = np.empty((len(loads), model.n_experts + redundant), np.int16)
    n_group, n_nodes = _hierarchy(model, ep_size, ranks_per_node)
    group_loads = loads.astype(np.float32).reshape(len(loads), n_group, -1).sum(axis=2)
    _balance_layers(loads, group_loads, n_nodes, ep_size, refined, phy2log)
    return phy2log


def _hierarchy(model: ModelSpec, ep_size: int, ranks_per_node: int) -> tuple[int, int]:
    """Groups and nodes that EPLB goes by: those of model and ranks if it can be hierarchical, else one of each."""
    n_nodes = -(-ep_size // ranks_per_node)
    fits = model.n_group % n_nodes == 0 and ep_size % n_nodes == 0
    return (model.n_group, n_nodes) if fits else (1, 1)


def _busiest_share(shares: np.ndarray) -> np.ndarray:
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
        costs.append((layer_cost or _busiest_share)((share / held)[layer[:, None], experts].reshape(maps[-1].shape)))
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


def spread_copies(placement: Placement, loads: np.ndarray) -> Placement:
    """The placement without two copies of an expert on one rank: such a copy changes places with a slot of another rank, or
    becomes a copy of another expert, whichever leaves the heaviest rank lightest. Ranks have equal numbers of slots; loads are
    float64 [rows, n_experts]. Raises InputError where a layer's heaviest rank would get heavier.
    """
    experts = placement.experts.copy()
    for row in np.flatnonzero(placement.idle_copies):
        per_rank = placement.slots_of_row[row] // placement.ep_size
        if not _spread(experts[row].reshape(placement.ep_size, -1)[:, :per_rank], loads[row]):  # a view
            layer = placement.layer_ids[row] if placement.layer_ids else row
            raise InputError(
                f"`strategy` {placement.strategy}: a rank of layer {layer} holds two copies of one expert, and none can move "
                "without making the heaviest rank heavier"
            )
    return replace(placement, experts=experts)


def _spread(slots: np.ndarray, load: np.ndarray) -> bool:
    """Take copies off ranks that have two, the experts in place: slots int [ranks, slots of a rank]. Then, as long as the
    heaviest rank is heavier than at first, change its slots. Whether that was possible.
    """
    most = None
    while True:
        copies = np.bincount(slots.ravel(), minlength=load.size)
        now = (load / copies)[slots].sum(axis=1)
        most = now.max() if most is None else most
        twins = [(rank, i) for rank, held in enumerate(slots.tolist()) for i, e in enumerate(held) if e in held[:i]]
        if not twins and now.max() <= most * (1 + _LEAST_GAIN):
            return True
        places = twins[:1] or [(int(now.argmax()), i) for i in range(slots.shape[1])]
        found = [_change_slot(slots, load, copies, now, *place) for place in places]
        outcome, change = min(found, key=lambda result: result[0])
        if change is None or (not twins and outcome >= (now.max(), (now * now).sum() * (1 - _LEAST_GAIN))):
            return False
        slots[:] = change


def _change_slot(
    slots: np.ndarray, load: np.ndarray, copies: np.ndarray, now: np.ndarray, rank: int, place: int
) -> tuple[tuple[float, float], np.ndarray | None]:
    """Slots after the best change of one of them, to an expert that its rank has not: as a further copy of it, or by an
    exchange with another rank. With the heaviest rank after it and the squares of all, infinite where there is none.
    """
    mine, share = slots[rank, place], load / copies
    held = np.array([np.bincount(row, minlength=load.size) for row in slots])  # [ranks, experts]
    best, change = (np.inf, np.inf), None
    taken = np.flatnonzero(held[rank] == 0)
    if copies[mine] > 1 and taken.size:
        less, more = load[mine] / (copies[mine] - 1), load[taken] / (copies[taken] + 1)
        after = now + held[:, mine] * (less - share[mine]) + held.T[taken] * (more - share[taken])[:, None]
        after[:, rank] += more - less
        best, i = _lightest(after)
        change = slots.copy()
        change[rank, place] = taken[i]
    others, at = np.nonzero((held[rank] == 0)[slots] & (held[:, mine] == 0)[:, None])
    if others.size:
        moved = share[slots[others, at]] - share[mine]
        after = np.repeat(now[None], others.size, axis=0)
        after[:, rank] += moved
        after[np.arange(others.size), others] -= moved
        outcome, i = _lightest(after)
        if outcome < best:
            best, change = outcome, slots.copy()
            change[rank, place], change[others[i], at[i]] = slots[others[i], at[i]], mine
    return best, change


def _lightest(after: np.ndarray) -> tuple[tuple[float, float], int]:
    """Largest load and squares of loads of the outcome, [outcomes, ranks], that has the lightest heaviest rank."""
    heaviest, squares = after.max(axis=1), (after * after).sum(axis=1)
    i = int(np.lexsort((squares, heaviest))[0])
    return (float(heaviest[i]), float(squares[i])), i


def check_loads(loads: Any, n_experts: int, where: str, layers: bool = False) -> np.ndarray:
    """Loads of experts as float64 [n_experts], or with `layers` [layers, n_experts]. Raises InputError where they are not
    numbers, not finite, negative, or of another shape.
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
