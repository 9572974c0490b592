"""Which copy of a replicated expert a token goes to: loads of slots from those of experts.

even
    A step's pairs of an expert are split over its copies as evenly as whole numbers allow, the first copies taking the
    remainder. What EPLB assumes, and near what a round robin over tokens gives.
vllm_hash
    vLLM's choice: copy (index * 2654435769 mod 2**32) % copies, for the index of the token in its step. There the index is
    that in the batch of the rank that the token comes from; here it runs over the whole step.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel

REPLICA_CHOICES = ("even", "vllm_hash")
_MULTIPLIER, _LOW = np.uint64(2654435769), np.uint64(0xFFFFFFFF)


class Copies(NamedTuple):
    """Copies of the experts of some layouts."""

    slots: np.ndarray  # int32 [layouts, slots], expert by expert, the copies of one in order
    first: np.ndarray  # int32 [layouts, n_experts + 1], where the copies of each expert begin, and the end


def find_copies(experts: np.ndarray, n_experts: int) -> Copies:
    """Copies of the layouts `experts` int16 [layouts, slots], the expert in each slot."""
    slots = np.argsort(experts, axis=1, kind="stable").astype(np.int32)
    first = np.zeros((len(experts), n_experts + 1), np.int32)
    for row, of_slot in zip(first, experts, strict=True):
        np.cumsum(np.bincount(of_slot, minlength=n_experts), out=row[1:])
    return Copies(slots, first)


@kernel
def deal_evenly(counts, layout_of_trial, copies, dealt):
    """Split the pairs of each expert evenly: counts int32 [trials, steps, n_experts]; layout_of_trial int64 [trials]; dealt
    int32 [trials, steps, slots].
    """
    for t in range(counts.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        for step in range(counts.shape[1]):
            for e in range(counts.shape[2]):
                n, count = first[e + 1] - first[e], counts[t, step, e]
                if n == 1:
                    dealt[t, step, slots[first[e]]] = count
                    continue
                for k in range(n):
                    dealt[t, step, slots[first[e] + k]] = count // n + (k < count % n)


@kernel
def _hashed(index):
    return (np.uint64(index) * _MULTIPLIER) & _LOW


@kernel
def deal_by_hash(ids, tokens, layout_of_trial, copies, dealt):
    """Send each token to the copies of vLLM's choice: ids int16 [trials, tokens of the largest step, top_k]; tokens int64
    [steps], ascending; dealt int32 [trials, steps, slots].
    """
    running = np.empty(dealt.shape[2], np.int32)
    for t in range(ids.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        running[:] = 0
        step = 0
        for i in range(ids.shape[1]):
            word = _hashed(i)
            for k in range(ids.shape[2]):
                begin = first[ids[t, i, k]]
                n = first[ids[t, i, k] + 1] - begin
                running[slots[begin + np.int64(word % np.uint64(n))]] += 1
            if i + 1 == tokens[step]:
                dealt[t, step] = running
                step += 1


@kernel
def pick_slots(ids, first_trial, layout_of_trial, copies, slot):
    """Slots of one token per trial, ids int16 [trials, top_k], whose index in its step is as good as random: slot int64
    [trials, top_k].
    """
    for t in range(ids.shape[0]):
        slots, first = copies.slots[layout_of_trial[t]], copies.first[layout_of_trial[t]]
        word = _hashed(first_trial + t)  # its high bits decide: the draw may fix the low ones
        for k in range(ids.shape[1]):
            begin = first[ids[t, k]]
            n = first[ids[t, k] + 1] - begin
            slot[t, k] = slots[begin + np.int64(word * np.uint64(n) >> np.uint64(32))]
