"""Greedy packing, EPLB's `balanced_packing`: the heaviest item first, each to the lightest pack with room."""

import numpy as np

from sim.kernels import kernel


@kernel
def pack(load, n_packs, pack, place):
    """Pack items of `load` float64 [items] in packs of equal numbers; pack and place in it, int64 [items].

    As many packs as items: each its own, in order, as upstream does.
    """
    if load.size == n_packs:
        for i in range(load.size):
            pack[i], place[i] = i, 0
        return
    total, held = np.zeros(n_packs), np.zeros(n_packs, np.int64)
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
    """Reorder the experts of slots, int64 [slots], so that they lie rank by rank; share float64 [experts], the load of one
    copy.
    """
    rank, place = np.empty(expert.size, np.int64), np.empty(expert.size, np.int64)
    pack(share[expert], n_ranks, rank, place)
    packed, per_rank = np.empty_like(expert), expert.size // n_ranks
    for slot in range(expert.size):
        packed[rank[slot] * per_rank + place[slot]] = expert[slot]
    expert[:] = packed
