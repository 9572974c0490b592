"""Copies of experts, where a placement has replicas: which of them a step's pairs go to.

Physical experts (slots) then stand in for experts: a step's pairs are assigned to them first, and distinct experts are slots
with at least one token. Which copy a token goes to is the replica choice:

even
    A step's pairs of an expert are split over its copies as evenly as whole numbers allow, the first copies taking the
    remainder. What EPLB assumes, and near what a round robin over tokens gives.
vllm_hash
    vLLM's choice: copy (index * 2654435769 mod 2**32) % copies, for the index of the token in its step. There the index is
    that in the batch of the rank that the token comes from; here it runs over the whole step.
in_step
    The best split of a step's pairs over the copies that there are: the busiest rank has as few pairs as any split gives it.
    What balancers within the step strive for (LPLB, SGLang's --ep-dispatch-algorithm lp), and none can beat. A pair cannot be
    halved: the least load is a whole number, the linear programme's optimum rounded up. It minimises the load, as they do, and
    not the time: distinct experts are those that come out, of a split that takes an expert's pairs apart only where the ranks'
    loads ask for it. Balancers that copy experts within the step (UltraEP, MoonEP) are not bound to the copies that there are.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel

_MULTIPLIER, _LOW = np.uint64(2654435769), np.uint64(0xFFFFFFFF)


class Copies(NamedTuple):
    """Copies of the experts of some layouts."""

    slots: np.ndarray  # int32 [layouts, slots], expert by expert, the copies of one in order
    first: np.ndarray  # int32 [layouts, n_experts + 1], where the copies of each expert begin, and the end


def find_copies(experts: np.ndarray, n_experts: int) -> Copies:
    """Copies of the layouts `experts` int16 [layouts, slots], the expert in each slot; -1 is none, and comes first in `slots`."""
    slots = np.argsort(experts, axis=1, kind="stable").astype(np.int32)
    first = np.zeros((len(experts), n_experts + 1), np.int32)
    for row, of_slot in zip(first, experts, strict=True):
        np.cumsum(np.bincount(of_slot.astype(np.int64) + 1, minlength=n_experts + 1), out=row)
    return Copies(slots, first)


@kernel
def assign_evenly(counts, layout_of_trial, copies, assigned):
    """Split the pairs of each expert evenly: counts int32 [trials, steps, n_experts]; layout_of_trial int64 [trials];
    assigned int32 [trials, steps, slots].
    """
    for t in range(counts.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        for step in range(counts.shape[1]):
            for e in range(counts.shape[2]):
                n, count = first[e + 1] - first[e], counts[t, step, e]
                if n == 1:
                    assigned[t, step, slots[first[e]]] = count
                    continue
                for k in range(n):
                    assigned[t, step, slots[first[e] + k]] = count // n + (k < count % n)


@kernel
def hashed(index):
    """vLLM's hash of a token's index in its step."""
    return (np.uint64(index) * _MULTIPLIER) & _LOW


@kernel
def slot_by_hash(word, expert, slots, first):
    """Slot of the copy of an expert that vLLM takes for a token whose index has the hash `word`."""
    begin, n = first[expert], first[expert + 1] - first[expert]
    return slots[begin + np.int64(word % np.uint64(n))]


@kernel
def assign_by_hash(ids, tokens, layout_of_trial, copies, assigned):
    """Send each token to the copies of vLLM's choice: ids int16 [trials, tokens of the largest step, top_k]; tokens int64
    [steps], ascending; assigned int32 [trials, steps, slots].
    """
    running = np.empty(assigned.shape[2], np.int32)
    for t in range(ids.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        running[:] = 0
        step = 0
        for i in range(ids.shape[1]):
            word = hashed(i)
            for k in range(ids.shape[2]):
                running[slot_by_hash(word, ids[t, i, k], slots, first)] += 1
            if i + 1 == tokens[step]:
                assigned[t, step] = running
                step += 1


@kernel
def assign_in_step(counts, layout_of_trial, copies, ranks, n_ranks, assigned):
    """Split the pairs of each step so that the busiest rank has the fewest: counts int32 [trials, steps, n_experts];
    layout_of_trial int64 [trials]; ranks int32 [layouts, slots], ascending; assigned int32 [trials, steps, slots].
    """
    n_slots = ranks.shape[1]
    expert, begin = np.empty(n_slots, np.int64), np.empty(n_ranks + 1, np.int64)
    load, queue = np.empty(n_ranks, np.int64), np.empty(n_ranks, np.int64)
    giver, taker = np.empty(n_ranks, np.int64), np.empty(n_ranks, np.int64)
    for t in range(counts.shape[0]):
        row = layout_of_trial[t]
        slots, first, rank = copies.slots[row], copies.first[row], ranks[row]
        begin[:] = np.searchsorted(rank, np.arange(n_ranks + 1))
        for e in range(counts.shape[2]):
            expert[slots[first[e] : first[e + 1]]] = e
        for step in range(counts.shape[1]):
            _assign_whole(counts[t, step], slots, first, rank, load, assigned[t, step])
            limit = -(-load.sum() // n_ranks)
            while True:
                busiest = np.argmax(load)
                if load[busiest] <= limit:
                    break
                n, found = _reach(
                    busiest, limit, slots, first, rank, expert, begin, load, queue, giver, taker, assigned[t, step]
                )
                if found >= 0:
                    _shift(busiest, found, limit, rank, load, giver, taker, assigned[t, step])
                else:  # the pairs of the ranks that were reached have no copies elsewhere
                    limit = -(-load[queue[:n]].sum() // n)


@kernel
def _assign_whole(count, slots, first, rank, load, assigned):
    """Give all pairs of an expert to one copy, that on the rank with the lightest load so far: count int32 [n_experts]; load
    int64 [ranks]; assigned int32 [slots].
    """
    load[:] = 0
    for copied in (False, True):
        for e in range(count.size):
            if (first[e + 1] - first[e] > 1) != copied:
                continue
            best = slots[first[e]]
            for k in range(first[e], first[e + 1]):
                assigned[slots[k]] = 0
                if load[rank[slots[k]]] < load[rank[best]]:
                    best = slots[k]
            assigned[best] = count[e]
            load[rank[best]] += count[e]


@kernel
def _reach(start, limit, slots, first, rank, expert, begin, load, queue, giver, taker, assigned):
    """Ranks that pairs of rank `start` can be shifted to, perhaps over others, breadth first, up to the first one with a load
    below `limit`: how many were reached, in `queue`, and that one or -1. giver and taker int64 [ranks]: the copies that pairs
    leave and go to, on the last leg to each.
    """
    giver[:] = -1
    giver[start], queue[0], n, i = 0, start, 1, 0
    while i < n:
        for s in range(begin[queue[i]], begin[queue[i] + 1]):
            if assigned[s] == 0:
                continue
            for k in range(first[expert[s]], first[expert[s] + 1]):
                r = rank[slots[k]]
                if giver[r] < 0:
                    giver[r], taker[r], queue[n] = s, slots[k], r
                    n += 1
                    if load[r] < limit:
                        return n, r
        i += 1
    return n, -1


@kernel
def _shift(start, end, limit, rank, load, giver, taker, assigned):
    """Shift as many pairs along the way from rank `start` to `end` as it has, up to the limit of both."""
    pairs = min(load[start] - limit, limit - load[end])
    r = end
    while r != start:
        pairs = min(pairs, assigned[giver[r]])
        r = rank[giver[r]]
    r = end
    while r != start:
        assigned[giver[r]] -= pairs
        assigned[taker[r]] += pairs
        r = rank[giver[r]]
    load[start] -= pairs
    load[end] += pairs


@kernel
def pick_slots(ids, trials, layout_of_trial, copies, slot):
    """Slots of one token of each trial, ids int16 [trials, top_k], whose index in its step is as good as random: trials int64,
    their numbers; slot int16 [trials, top_k].
    """
    for t in range(ids.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        word = hashed(trials[t])  # its high bits decide: the draw may fix the low ones
        for k in range(ids.shape[1]):
            begin = first[ids[t, k]]
            n = first[ids[t, k] + 1] - begin
            slot[t, k] = slots[begin + np.int64(word * np.uint64(n) >> np.uint64(32))]


@kernel
def slots_by_hash(ids, layout_of_trial, copies, slot):
    """Slots that the tokens of steps go to under vLLM's choice: ids int16 [trials, tokens, top_k]; slot int16 of that shape."""
    for t in range(ids.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        for i in range(ids.shape[1]):
            word = hashed(i)
            for k in range(ids.shape[2]):
                slot[t, i, k] = slot_by_hash(word, ids[t, i, k], slots, first)
