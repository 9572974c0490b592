"""Loads of ranks and what they are summed up by. One block = one step of one MoE layer.

load of a rank
    (token, expert) pairs that it computes.
max load
    The largest load over ranks: the layer is a barrier, so it sets the layer's time.
imbalance
    max load / mean load, at least 1 (Megatron-LM: overload factor; TensorRT-LLM's spread is imbalance - 1).
balancedness
    mean load / max load, of one layer (vLLM and SGLang; over layers the two differ).
idle ranks
    Ranks of load 0.
one-rank event
    All of a step's load on one rank: all other ranks idle.
distinct experts
    Experts of a rank with at least one token: weights that it must read. On the busiest rank (the lowest of equals),
    and the most over ranks.
fan-out
    Distinct ranks (nodes) that one token is sent to; a node is a run of `ranks_per_node` ranks joined by NVLink.

Where experts have replicas, slots stand in for experts: their pairs are dealt to slots first (`sim.replicas`), and distinct
experts are slots with at least one token.
"""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel

METRICS = ("max_load", "idle_ranks", "distinct_experts_busiest", "distinct_experts_max")


class Layouts(NamedTuple):
    """Placements laid out for the kernels, one row each."""

    ranks: np.ndarray  # int32 [layouts, n_experts], the rank of each expert
    experts: np.ndarray  # int16 [layouts, n_experts], the experts rank by rank
    bounds: (
        np.ndarray
    )  # int32 [layouts, largest EP size + 2]: EP size, begin of each rank in `experts`, end of the last


def lay_out(ranks: np.ndarray, ep_sizes: np.ndarray) -> Layouts:
    """Layouts of `ranks` int32 [layouts, n_experts] on `ep_sizes` int64 [layouts] ranks."""
    experts = np.empty(ranks.shape, np.int16)
    bounds = np.zeros((len(ranks), int(ep_sizes.max()) + 2), np.int32)
    _fill_layouts(ranks, ep_sizes, experts, bounds)
    return Layouts(ranks, experts, bounds)


@kernel
def _fill_layouts(ranks, ep_sizes, experts, bounds):
    for row in range(ranks.shape[0]):
        rank, begin = ranks[row], bounds[row]
        begin[0] = ep_sizes[row]
        for e in range(rank.size):
            begin[2 + rank[e]] += 1
        for r in range(ep_sizes[row]):
            begin[2 + r] += begin[1 + r]
        free = begin[1:].copy()
        for e in range(rank.size):
            experts[row, free[rank[e]]] = e
            free[rank[e]] += 1


@kernel
def score_blocks(counts, cells, step_of_cell, pair_of_cell, layout_of_pair, layouts, scores):
    """Score each block under some cells: pairs (placement, EP size) at one number of tokens per step.

    counts int32 [trials, steps, n_experts]; cells int64, those to score; step_of_cell, pair_of_cell int64 [all cells];
    layout_of_pair int64 [trials, pairs]; scores int32 [trials, all cells, 4], the METRICS.
    """
    all_experts, all_bounds = layouts.experts, layouts.bounds
    for t in range(counts.shape[0]):
        for c in cells:
            layout = layout_of_pair[t, pair_of_cell[c]]
            count, experts, begin = counts[t, step_of_cell[c]], all_experts[layout], all_bounds[layout]
            busiest, idle, distinct_busiest, distinct_max = 0, 0, 0, 0
            for r in range(begin[0]):
                load, distinct = 0, 0
                for slot in range(begin[1 + r], begin[2 + r]):
                    pairs = count[np.uint16(experts[slot])]
                    load += pairs
                    distinct += pairs > 0
                idle += load == 0
                distinct_max = max(distinct_max, distinct)
                distinct_busiest = distinct if load > busiest else distinct_busiest
                busiest = max(busiest, load)
            scores[t, c, 0] = busiest
            scores[t, c, 1] = idle
            scores[t, c, 2] = distinct_busiest
            scores[t, c, 3] = distinct_max


@kernel
def rank_loads(counts, step_of_pair, layout_of_pair, layouts, first_rank, loads):
    """Load of each rank of each pair at one of the steps: counts int32 [trials, steps, n_experts]; first_rank int64
    [pairs], where a pair's ranks begin in loads int64 [trials, ranks of all pairs], to which is added.
    """
    for t in range(counts.shape[0]):
        for p in range(first_rank.size):
            rank, count = layouts.ranks[layout_of_pair[t, p]], counts[t, step_of_pair[p]]
            for e in range(rank.size):
                loads[t, first_rank[p] + rank[e]] += count[e]


@kernel
def fan_out(ids, pairs, layout_of_pair, layouts, ranks_per_node, reached):
    """Ranks and nodes that one token per trial is sent to: ids int [trials, top_k]; pairs int64, their places in reached
    int64 [trials, all pairs, 2].
    """
    for t in range(ids.shape[0]):
        for p in range(layout_of_pair.shape[1]):
            rank = layouts.ranks[layout_of_pair[t, p]]
            n_ranks, n_nodes = 0, 0
            for k in range(ids.shape[1]):
                new_rank, new_node = 1, 1
                mine = rank[ids[t, k]]
                for j in range(k):
                    theirs = rank[ids[t, j]]
                    if theirs == mine:
                        new_rank = 0
                    if theirs // ranks_per_node == mine // ranks_per_node:
                        new_node = 0
                n_ranks += new_rank
                n_nodes += new_node
            reached[t, pairs[p], 0] = n_ranks
            reached[t, pairs[p], 1] = n_nodes
