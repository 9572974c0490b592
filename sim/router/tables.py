"""Sampling tables of one layer: weights, alias tables per expert group, and draws from them."""

from typing import NamedTuple

import numpy as np

from sim.kernels import kernel, part

TINY = 1e-38
"""Least weight of what is left of a group, should all of it be 0: it arrives after all others, but it does arrive."""
SMALL = 1 / 16
"""A weight that falls below this share of itself is summed afresh, since the subtraction would have lost digits."""


class GroupedTopk(NamedTuple):
    """The router's rule, as kernels take it."""

    n_group: int
    size: int  # experts of a group
    topk_group: int
    top_k: int
    group_sigma: np.float32  # of the effect that a token has on a group
    score_law: tuple[np.float32, np.float32, np.float32]  # (b, a, both), see `sim.router.draw.score_law`


class Layer(NamedTuple):
    """Tables of one layer (and request). A gap is a mean time between arrivals, 1 / weight, without the group effect."""

    weight: np.ndarray  # float64 [n_experts], exp(mu)
    gap: np.ndarray  # float32 [n_group], of a group's arrivals
    gap_without: np.ndarray  # float32 [n_experts], of the others of its group; infinite where there are none
    alias: np.ndarray  # uint64 [n_experts], alias tables, one per group: threshold * 2**32 + alias
    scratch: np.ndarray  # float64 [2, n_experts]


@part
def new_tables(n, n_experts, n_group):
    """Unfilled tables of n layers, along a leading axis."""
    return Layer(
        np.empty((n, n_experts), np.float64),
        np.empty((n, n_group), np.float32),
        np.empty((n, n_experts), np.float32),
        np.empty((n, n_experts), np.uint64),
        np.empty((n, 2, n_experts), np.float64),
    )


@part
def layer_of(tables, i):
    """Tables of layer i."""
    return Layer(tables.weight[i], tables.gap[i], tables.gap_without[i], tables.alias[i], tables.scratch[i])


@kernel
def total_of(weight, lo, hi):
    """Sum of weight[lo:hi], one after another."""
    total = 0.0
    for e in range(lo, hi):
        total += weight[e]
    return total


@kernel
def gap_of(weight):
    """Mean time between arrivals of experts of some weight together."""
    return np.float32(1 / max(weight, TINY))


@kernel
def gap_of_others(e, lo, hi, total, weight):
    """Mean time between arrivals of a group's experts lo .. hi - 1 other than e."""
    if hi - lo == 1:
        return np.float32(np.inf)
    rest = total - weight[e]
    if rest < SMALL * total:
        rest = total_of(weight, lo, e) + total_of(weight, e + 1, hi)
    return gap_of(rest)


@kernel
def fill_alias(lo, hi, total, weight, alias, scratch):
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
    weight = layer.weight
    size = mu.size // layer.gap.size
    for e in range(mu.size):
        weight[e] = np.exp(mu[e])
    for g in range(layer.gap.size):
        lo, hi = g * size, (g + 1) * size
        total = total_of(weight, lo, hi)
        layer.gap[g] = gap_of(total)
        for e in range(lo, hi):
            layer.gap_without[e] = gap_of_others(e, lo, hi, total, weight)
        fill_alias(lo, hi, total, weight, layer.alias, layer.scratch)


@kernel(forceinline=True)
def draw_mark(word, group, size, alias):
    """Expert of a group, uint32, drawn from its alias table by one word.

    Indices are unsigned, which spares the check for negative ones, and both outcomes lie in one entry: a select, where a
    branch would be mispredicted half of the time.
    """
    product = np.uint64(word) * np.uint64(size)
    e = np.uint64(group) * np.uint64(size) + (product >> np.uint64(32))
    entry = alias[e]
    keep = (product & np.uint64(0xFFFFFFFF)) < (entry >> np.uint64(32))
    return np.uint32(e) if keep else np.uint32(entry & np.uint64(0xFFFFFFFF))
