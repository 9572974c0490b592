"""Request effects: what a request adds to the logits of a layer, and requests drawn by a Latin hypercube."""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from sim.kernels import kernel
from sim.streams import REQUEST, fill_words

_OWN = 4  # draws of an expert's own effect that a request is averaged over


class RequestEffect(NamedTuple):
    """Distribution of the request effect of a layer, in units of its strength: see `FittedLayers`."""

    sd: np.ndarray  # float64 [experts]
    loadings: np.ndarray  # float64 [factors, experts]
    correlation: float  # of two tokens' picks, that the strength is to give: covariance / variance, summed over experts


class DrawnEffects(NamedTuple):
    """What drawn requests add to the logits, per unit of strength: by common factors, and by experts' own (see
    `sum_selection`).
    """

    shared: np.ndarray  # float64 [requests, experts]
    own: np.ndarray  # float32 [requests, 1 + _OWN, experts]


@kernel
def fill_ranks(words, ranks):
    """Place of each word in ascending order, equal ones as they lie: words uint32 [n], ranks int32 [n].

    By buckets of the leading bits, about one uniform word in each, then by insertion.
    """
    n, shift = words.size, 32
    while 1 << (32 - shift) < n:
        shift -= 1
    start = np.zeros((1 << (32 - shift)) + 1, np.int32)
    for word in words:
        start[(np.int64(word) >> shift) + 1] += 1
    for b in range(start.size - 1):
        start[b + 1] += start[b]
    order = np.empty(n, np.int32)
    for i in range(n):
        b = np.int64(words[i]) >> shift
        order[start[b]] = i
        start[b] += 1
    for i in range(1, n):
        row, place = order[i], i
        while place > 0 and words[order[place - 1]] > words[row]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = row
    for i in range(n):
        ranks[order[i]] = i


@kernel
def fill_own(ranks, quantiles, sd, own):
    """Experts' own effects: ranks int32 [2 experts, n], of the effect and then of its strata; quantiles float64
    [n, 1 + strata], of one and the other; sd float64 [experts]; own float32 [n, 1 + strata, experts].
    """
    n_experts = sd.size
    for q in range(own.shape[0]):
        for e in range(n_experts):
            own[q, 0, e] = quantiles[ranks[e, q], 0] * sd[e]
            in_strata = quantiles[ranks[n_experts + e, q]]
            for i in range(1, own.shape[1]):
                own[q, i, e] = in_strata[i] * sd[e]


def draw_effects(effect: RequestEffect, key: np.ndarray, layer: int, n: int) -> DrawnEffects:
    """Effects of n requests. An expert's own are stratified: the _OWN of a request that `sum_selection` averages over, and
    those of all requests by a Latin hypercube, so each is one of n quantiles.
    """
    n_factors, n_experts = effect.loadings.shape
    words = np.empty((-(-(2 * n_experts + n_factors) // 4) * 4, n), np.uint32)
    fill_words(key, REQUEST, layer, 0, n, words)
    ranks = np.empty((2 * n_experts + n_factors, n), np.int32)
    for of_effect, out in zip(words, ranks, strict=False):  # the last block has words to spare
        fill_ranks(of_effect, out)
    levels = (np.arange(n) + 0.5) / n
    quantiles = ndtri(np.stack([levels, *((stratum + levels) / _OWN for stratum in range(_OWN))], axis=1))
    own = np.empty((n, 1 + _OWN, n_experts), np.float32)
    fill_own(ranks[: 2 * n_experts], quantiles, effect.sd, own)
    return DrawnEffects(quantiles[ranks[2 * n_experts :], 0].T @ effect.loadings, own)
