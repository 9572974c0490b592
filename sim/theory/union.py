"""Bounds on the probability of a union, from its events one by one and two by two."""

import numpy as np

from sim.kernels import kernel
from sim.theory.sums import tail, tilt, tilted_moments

_NEGLIGIBLE = 0.02  # of a sum, that a term's own bound may replace the term


@kernel
def at_least_one(single, pairs):
    """Lower bound of P(any of some events), from the sum of their probabilities and a number that is not below the sum
    over all pairs of events (Dawson and Sankoff 1967): at least Bonferroni's single - pairs, and never negative.
    """
    if single <= 0.0:
        return 0.0
    kappa = 1 + np.floor(2 * pairs / single)
    return min(2 * single / (kappa + 1) - 2 * pairs / (kappa * (kappa + 1)), 1.0)


@kernel
def _hottest(laws):
    """The law with the largest mean, and that mean."""
    hottest, largest_mean = 0, -1.0
    for i in range(laws.shape[0]):
        mean = tilted_moments(laws[i], 0.0)[1]
        if mean > largest_mean:
            hottest, largest_mean = i, mean
    return hottest, largest_mean


@kernel
def _sum_of_tails(laws, n_tokens, least, floor, up):
    """Sum of the tails of some laws, not above 1: laws float64 [n, largest + 1].

    Where a law's Chernoff bound is negligible beside the largest tail, or beside `floor`, the bound (up) or 0 stands for
    the tail, so that the sum is not below (not above) the true one.
    """
    hottest, largest_mean = _hottest(laws)
    if up and least <= n_tokens * largest_mean:
        return 1.0
    total = tail(laws[hottest], n_tokens, least)
    small = _NEGLIGIBLE / laws.shape[0] * max(total, floor)
    theta = 0.0
    if total > 0.0 and n_tokens * largest_mean < least < n_tokens * (laws.shape[1] - 1):
        theta = min(tilt(laws[hottest], least / n_tokens), 50.0)
    for i in range(laws.shape[0]):
        if i != hottest and total < 1.0:
            bound = np.exp(n_tokens * tilted_moments(laws[i], theta)[0] - theta * least) if theta > 0.0 else 1.0
            if bound > small:
                total += tail(laws[i], n_tokens, least)
            elif up:
                total += bound
    return min(total, 1.0)


@kernel
def fill_layer_bounds(upper, hot_lower, pair_upper, n_tokens, least, out):
    """Bounds of P(max load >= least) in each layer: out float64 [layers, 2], lower and upper.

    upper float64 [layers, ranks, largest + 1], load laws of single tokens that are not below the true ones in
    stochastic order; hot_lower [layers, hot ranks, ...], of some ranks laws that are not above; pair_upper [layers,
    pairs of hot ranks, ...], of the sum of two ranks' loads.
    """
    for layer in range(upper.shape[0]):
        high = _sum_of_tails(upper[layer], n_tokens, least, 0.0, True)
        single = _sum_of_tails(hot_lower[layer], n_tokens, least, 0.0, False)
        pairs = 1.0
        if single < 1.0:  # else the sum was cut off
            pairs = _sum_of_tails(pair_upper[layer], n_tokens, 2 * least, single, True) if pair_upper.shape[1] else 0.0
        low = at_least_one(single, pairs)
        if pairs >= 1.0:  # which says nothing; one rank alone is a bound too
            low = tail(hot_lower[layer, _hottest(hot_lower[layer])[0]], n_tokens, least)
        out[layer, 0] = min(low, high)
        out[layer, 1] = high
