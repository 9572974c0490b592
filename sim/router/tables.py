"""Sampling tables of one layer: weights, alias tables per expert group, and draws from them."""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel

TINY = np.float32(1e-38)
"""Weight of a group of which only experts of weight 0 are left: they arrive after all others, but they do arrive."""
SMALL = np.float32(1 / 16)
"""A weight that falls below this share of itself is summed afresh, since the subtraction would have lost digits."""


class Layer(NamedTuple):
    """Tables of one layer (and request). An expert that is alone in its group has others = 0."""

    weight: np.ndarray  # float64 [n_experts], exp(mu)
    others: np.ndarray  # float32 [n_experts], weight of the other experts of its group
    group_weight: np.ndarray  # float32 [n_group]
    alias: np.ndarray  # uint64 [n_experts], alias tables, one per group: threshold * 2**32 + alias
    scratch: np.ndarray  # float64 [2, n_experts]


@kernel
def new_layer(n_experts, n_group):
    """Unfilled tables."""
    return Layer(
        np.empty(n_experts, np.float64),
        np.empty(n_experts, np.float32),
        np.empty(n_group, np.float32),
        np.empty(n_experts, np.uint64),
        np.empty((2, n_experts), np.float64),
    )


@kernel
def _fill_alias(lo, hi, total, weight, alias, scratch):
    """Alias table of weight[lo:hi] (Vose 1991): thresholds in units of 2**-32, aliases as expert ids."""
    share, stack = scratch[0], scratch[1]
    small, large = lo, hi  # two stacks that grow towards each other
    for e in range(lo, hi):
        alias[e] = np.uint64(0xFFFFFFFF) << np.uint64(32) | np.uint64(e)
        share[e] = weight[e] * (hi - lo) / total if total > 0.0 else 1.0
        if share[e] < 1.0:
            stack[small] = e
            small += 1
        else:
            large -= 1
            stack[large] = e
    while small > lo and large < hi:
        small -= 1
        s, g = np.int64(stack[small]), np.int64(stack[large])
        alias[s] = np.uint64(share[s] * 2.0**32) << np.uint64(32) | np.uint64(g)
        share[g] -= 1.0 - share[s]
        if share[g] < 1.0:
            large += 1
            stack[small] = g
            small += 1


@kernel
def fill_layer(mu, layer):
    """Make the tables of a layer from its mean logits mu float64 [n_experts]."""
    weight, others, group_weight = layer.weight, layer.others, layer.group_weight
    size = mu.size // group_weight.size
    for e in range(mu.size):
        weight[e] = np.exp(mu[e])
    for g in range(group_weight.size):
        lo, hi = g * size, (g + 1) * size
        total = weight[lo:hi].sum()
        group_weight[g] = total
        for e in range(lo, hi):
            rest = total - weight[e]
            if rest < SMALL * total:
                rest = weight[lo:e].sum() + weight[e + 1 : hi].sum()
            others[e] = max(np.float32(rest), TINY) if size > 1 else np.float32(0)
        _fill_alias(lo, hi, total, weight, layer.alias, layer.scratch)


@kernel
def draw_mark(word, group, size, alias):
    """Expert of a group, int32, drawn from its alias table by one word.

    Indices are unsigned, which spares the check for negative ones, and both outcomes lie in one entry: a select, where a
    branch would be mispredicted half of the time.
    """
    product = np.uint64(word) * np.uint64(size)
    e = np.uint64(group) * np.uint64(size) + (product >> np.uint64(32))
    entry = alias[e]
    keep = (product & np.uint64(0xFFFFFFFF)) < (entry >> np.uint64(32))
    return np.int32(e) if keep else np.int32(entry & np.uint64(0xFFFFFFFF))
