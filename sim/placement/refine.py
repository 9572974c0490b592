"""A search on from EPLB's map: slots change places, and replicas change experts, while the heaviest rank gets lighter.

EPLB gives replicas out without a look at how the slots will pack. Here one replica is taken from an expert that misses it
least and given to one of the hottest, the slots are packed again, and the best of these changes is kept, as long as the
heaviest rank gets lighter, or, at the same weight of it, the loads more even. The result is never heavier than EPLB's.
"""

import numpy as np

from sim.kernels import kernel
from sim.placement.packing import pack_slots

_CANDIDATES = 4  # experts on each side of a change
_LEAST_GAIN = 1e-9  # of the largest load


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
