"""Placed layers of drawn popularity: busiest rank, idle ranks and received tokens between bounds.

Where experts differ in popularity no closed form is known for the load of a rank by one token, so its distribution is counted
from tokens. It is bounded in stochastic order, through its probabilities of at least j experts: sums of tokens are then bounded
too, however many. All these bounds hold together with 95 % confidence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtr

from sim.kernels import kernel
from sim.stats import CONFIDENCE
from sim.theory.tails import TailsOfSums, fill_layer_bounds, join_layer_bounds

_TALLIED = 2**10  # tokens whose loads are counted together
_TABULATED = 128  # tokens of a step up to which all thresholds of a distribution are worked out at once
_EARLIER = np.uint16(2**15)
_COMMON = 0.5  # probability, by the normal approximation


@dataclass(frozen=True, eq=False)
class DrawnLayers:
    """Loads by one token under a pair (placement, EP size) on some layer draws: P(a token has j = 0 .. top_k experts there),
    float64 [layers, n, top_k + 1]. Probabilities of a step are means over the layers, each between bounds.
    """

    upper: np.ndarray  # of each rank, not below the true one in stochastic order
    lower: np.ndarray  # of each rank, not above
    hot_lower: np.ndarray  # of the ranks with the largest mean loads
    pair_upper: np.ndarray  # of each two of these together

    @classmethod
    def of_counts(cls, counts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], n_tokens: int) -> "DrawnLayers":
        """Layers of which n_tokens were counted each: int64 [ranks, top_k + 1], tokens with j experts on each rank; int64
        [hot ranks]; int64 [pairs, top_k + 1], tokens with j experts on each two of these.
        """
        single, hot, together = (np.stack(parts) for parts in zip(*counts, strict=True))
        n_bounds = 2 * len(single) * (single.shape[2] - 1) * (single.shape[1] + together.shape[1])
        log_odds = np.log(n_bounds / (1 - CONFIDENCE))
        upper, lower = (_bounded(single, n_tokens, log_odds, up) for up in (True, False))
        hot_lower = np.take_along_axis(lower, hot[:, :, None], axis=1)
        return cls(upper, lower, hot_lower, _bounded(together, n_tokens, log_odds, True))

    def max_load(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(max load >= least): (lower bound, upper bound); (0, 1) where it is common, which sampling sees better."""
        if _is_common(*self._moments, n_tokens, least):
            return 0.0, 1.0
        out = np.empty((len(self.upper), 2))
        if n_tokens <= _TABULATED:
            laws, places = (self.upper, self.hot_lower, self.pair_upper), (least, least, 2 * least)
            known = zip(laws, self._sums, places, strict=True)
            join_layer_bounds(*(of.at(n_tokens, x).reshape(p.shape[:2]) for p, of, x in known), out)
        else:
            fill_layer_bounds(self.upper, self.hot_lower, self.pair_upper, n_tokens, least, out)
        low, high = out.mean(axis=0)
        return float(low), float(high)

    @cached_property
    def _sums(self) -> list[TailsOfSums]:
        """Of the ranks, the hot ranks and their pairs."""
        laws = (self.upper, self.hot_lower, self.pair_upper)
        return [TailsOfSums(p.reshape(-1, p.shape[2])) for p in laws]

    def forget_sums(self) -> None:
        """Free the laws of sums, tens of MB for each pair."""
        vars(self).pop("_sums", None)

    def received(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(a rank receives at least `least` of the tokens): binomial on each rank. The lower bound is that of one rank."""
        upper, lower = 1 - self.upper[..., 0], 1 - self.lower[..., 0]
        if _is_common(upper, np.maximum(upper * (1 - upper), 1e-12), n_tokens, least):
            return 0.0, 1.0
        busiest = lower.max(axis=1, keepdims=True)
        laws = [np.stack([1 - p, p], axis=2) for p in (upper, busiest)]
        out = np.empty((len(upper), 2))
        fill_layer_bounds(laws[0], laws[1], np.empty((len(upper), 0, 2)), n_tokens, least, out)
        low, high = out.mean(axis=0)
        return float(low), float(high)

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each rank's load by one token, [layers, ranks]."""
        j = np.arange(self.upper.shape[2])
        mean = self.upper @ j
        return mean, np.maximum(self.upper @ j**2 - mean**2, 1e-12)

    def one_rank(self, n_tokens: int) -> tuple[float, float]:
        """P(all of a step's load on one rank)."""
        low, high = ((p[..., -1] ** n_tokens).sum(axis=1).mean() for p in (self.lower, self.upper))
        return float(low), min(float(high), 1.0)

    def idle_ranks(self, n_tokens: int, least: int) -> tuple[float, float] | None:
        """P(at least one idle rank); None for more than one, about which single ranks do not tell."""
        if least > 1:
            return None
        low, high = (self.upper[..., 0] ** n_tokens).max(axis=1), (self.lower[..., 0] ** n_tokens).sum(axis=1)
        return float(low.mean()), float(np.minimum(high, 1.0).mean())


def _is_common(mean: np.ndarray, variance: np.ndarray, n_tokens: int, least: int) -> bool:
    """Whether sampling sees that a rank gets at least `least` from all tokens: moments by one token, float64 [layers, ranks]."""
    p = ndtr((n_tokens * mean - least) / np.sqrt(n_tokens * variance)).sum(axis=1)
    return bool(np.minimum(p, 1.0).mean() > _COMMON)


def _bounded(counts: np.ndarray, n_tokens: int, log_odds: float, up: bool) -> np.ndarray:
    """Probabilities above (below) those that were counted, in stochastic order: P(at least j) moved to its bound."""
    at_least = np.cumsum(counts[..., :0:-1], axis=-1)[..., ::-1]
    bound = np.empty(at_least.shape)
    _fill_bounds(at_least.reshape(-1), n_tokens, log_odds, up, bound.reshape(-1))
    bound = np.concatenate([np.ones((*bound.shape[:-1], 1)), bound, np.zeros((*bound.shape[:-1], 1))], axis=-1)
    return bound[..., :-1] - bound[..., 1:]


@kernel
def _fill_bounds(hits, n, log_odds, up, out):
    """Chernoff's bound of a probability seen in `hits` of n tokens, wrong with probability exp(-log_odds) at most."""
    known = np.empty(n + 1)  # few numbers of hits are met once
    known[:] = -1.0
    for i in range(hits.size):
        if known[hits[i]] >= 0.0:
            out[i] = known[hits[i]]
            continue
        p = hits[i] / n
        variance = p if up else 1 - p
        reach = np.sqrt(2 * variance * log_odds / n) + 2 * log_odds / n  # not less than the bound is away
        inside, outside = p, min(p + reach, 1.0) if up else max(p - reach, 0.0)
        for _ in range(24 if inside != outside else 0):
            q = 0.5 * (inside + outside)
            gap = 0.0
            if p > 0.0:
                gap += p * np.log(p / q)
            if p < 1.0:
                gap += (1 - p) * np.log((1 - p) / (1 - q))
            if n * gap > log_odds:
                outside = q
            else:
                inside = q
        out[i] = known[hits[i]] = outside


@kernel
def tally_loads(ids, rank, hot, single, together):
    """Add tokens ids int16 [tokens, top_k] to single int64 [ranks, top_k + 1] and together int64 [pairs, top_k + 1], of
    which only loads from 1 on are of use. Tokens come last and numbers are narrow, so that loops over tokens vectorise.
    """
    top_k = ids.shape[1]
    ranks, of_rank = np.empty((top_k, _TALLIED), np.uint16), np.empty(_TALLIED, np.uint16)
    of_hot, most = np.empty((hot.size, _TALLIED), np.uint16), np.empty(hot.size, np.int64)
    for start in range(0, ids.shape[0], _TALLIED):
        n = min(_TALLIED, ids.shape[0] - start)
        for i in range(n):
            for k in range(top_k):
                ranks[k, i] = rank[np.uint16(ids[start + i, k])]
        for k in range(top_k):
            _count_same(n, ranks, k, of_rank)
            for i in range(n):
                single[ranks[k, i], of_rank[i]] += 1
        for a in range(hot.size):
            most[a] = _count_equal(n, ranks, np.uint16(hot[a]), of_hot[a])
        pair = 0
        for a in range(hot.size):
            for b in range(a + 1, hot.size):
                for load in range(1, min(most[a] + most[b], top_k) + 1):
                    together[pair, load] += _count_sums(n, of_hot[a], of_hot[b], np.uint16(load))
                pair += 1


@kernel
def _count_same(n, ranks, k, out):
    """Experts of each token on the rank of its k-th one; 0 where an earlier one is there, which is counted for both."""
    mine = ranks[k]
    out[:n] = 0
    for j in range(ranks.shape[0]):
        theirs = ranks[j]
        if j < k:
            for i in range(n):
                out[i] = _EARLIER if theirs[i] == mine[i] else out[i]
        else:
            for i in range(n):
                out[i] = out[i] + np.uint16(theirs[i] == mine[i])
    for i in range(n):
        out[i] = out[i] if out[i] < _EARLIER else np.uint16(0)


@kernel
def _count_equal(n, ranks, rank, out):
    """Experts of each token on a rank; returns the most."""
    most = np.uint16(0)
    out[:n] = 0
    for k in range(ranks.shape[0]):
        of_expert = ranks[k]
        for i in range(n):
            out[i] = out[i] + np.uint16(of_expert[i] == rank)
    for i in range(n):
        most = max(most, out[i])
    return np.int64(most)


@kernel
def _count_sums(n, a, b, load):
    """Tokens whose loads on two ranks add up to `load`."""
    found = np.uint16(0)
    for i in range(n):
        found = np.uint16(found + np.uint16(np.uint16(a[i] + b[i]) == load))
    return np.int64(found)
