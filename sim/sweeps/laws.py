"""Load laws of single tokens on drawn layers, sampled, between bounds that hold together with 95 % confidence.

Where experts differ in popularity no closed form is known, so the laws are counted from tokens that the sweep does not
use. A law is bounded in stochastic order, through its probabilities of at least j experts: sums of tokens are then
bounded too, however many.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtr

from sim.kernels import kernel
from sim.router import draw_trials
from sim.stats import CONFIDENCE
from sim.sweeps.layouts import Group, chunk_groups
from sim.sweeps.plan import Plan
from sim.theory import fill_layer_bounds

_BATCH_TOKENS = 2**13
_MOST_BATCHES = 16  # per layer
_LEAST_BATCHES, _TRIALS_PER_BATCH = 4, 625  # a larger sweep has more precise laws
_COMMON = 0.5  # probability, by the normal law
_HOT = 8  # ranks of a layer whose pairs are looked at
_FIRST_TRIAL = 3072 * 2**20  # beyond any trial of a sweep; trial t runs layer t % 2**20


@dataclass(frozen=True, eq=False)
class DrawnLayers:
    """Laws of a pair (placement, EP size) on some layer draws: P(a token has j = 0 .. top_k experts), float64 [layers, n,
    top_k + 1]. Probabilities of a step are means over the layers, each between bounds.
    """

    upper: np.ndarray  # of each rank, not below the true law in stochastic order
    lower: np.ndarray  # of each rank, not above
    hot_lower: np.ndarray  # of the ranks with the largest mean loads
    pair_upper: np.ndarray  # of each two of these together

    def max_load(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(max load >= least): (lower bound, upper bound); (0, 1) where it is common, which sampling sees better."""
        mean, variance = self._moments
        common = ndtr((n_tokens * mean - least) / np.sqrt(n_tokens * variance)).sum(axis=1)
        if np.minimum(common, 1.0).mean() > _COMMON:
            return 0.0, 1.0
        out = np.empty((len(self.upper), 2))
        fill_layer_bounds(self.upper, self.hot_lower, self.pair_upper, n_tokens, least, out)
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
        low, high = ((laws[..., -1] ** n_tokens).sum(axis=1).mean() for laws in (self.lower, self.upper))
        return float(low), min(float(high), 1.0)

    def idle_ranks(self, n_tokens: int, least: int) -> tuple[float, float] | None:
        """P(at least one idle rank); None for more than one, about which single ranks do not tell."""
        if least > 1:
            return None
        low, high = (self.upper[..., 0] ** n_tokens).max(axis=1), (self.lower[..., 0] ** n_tokens).sum(axis=1)
        return float(low.mean()), float(np.minimum(high, 1.0).mean())


def sample_laws(plan: Plan, pairs: list[int], n_layers: int, n_threads: int) -> list[DrawnLayers]:
    """Laws of some pairs of the grid, without replicas, on layer draws 0 .. n_layers - 1."""
    if not pairs:
        return []
    [group] = chunk_groups(plan, range(n_layers), pairs)
    n_batches = min(max(plan.trials // _TRIALS_PER_BATCH, _LEAST_BATCHES), _MOST_BATCHES)
    with ThreadPoolExecutor(n_threads) as pool:
        layers = list(pool.map(lambda i: _count(plan, group, i, n_batches), range(n_layers)))
    n_tokens = n_batches * _BATCH_TOKENS
    return [_bounded_laws([layer[i] for layer in layers], n_tokens) for i in range(len(pairs))]


def _bounded_laws(layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]], n_tokens: int) -> DrawnLayers:
    single, hot, together = (np.stack(arrays) for arrays in zip(*layers, strict=True))
    n_bounds = 2 * len(layers) * (single.shape[2] - 1) * (single.shape[1] + together.shape[1])
    log_odds = np.log(n_bounds / (1 - CONFIDENCE))
    upper, lower = (_bounded(single, n_tokens, log_odds, up) for up in (True, False))
    hot_lower = np.take_along_axis(lower, hot[:, :, None], axis=1)
    return DrawnLayers(upper, lower, hot_lower, _bounded(together, n_tokens, log_odds, True))


def _count(plan: Plan, group: Group, layer: int, n_batches: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each pair: tokens with j experts on each rank; the hottest ranks; tokens with j experts on two of these."""
    counts, _ = _tokens(plan, layer, _MOST_BATCHES)
    found = []
    ranks = group.layouts.ranks[group.rows[layer]]
    for p, rank in zip(group.pairs, ranks, strict=True):
        ep_size = plan.grid.pairs[p][1]
        hot = np.sort(np.argsort(-np.bincount(rank, counts[0, 0], ep_size), kind="stable")[:_HOT])
        width = plan.grid.top_k + 1
        found.append(
            (np.zeros((ep_size, width), np.int64), hot, np.zeros((len(hot) * (len(hot) - 1) // 2, width), np.int64))
        )
    for batch in range(n_batches):
        _, ids = _tokens(plan, layer, batch)
        for rank, (single, hot, together) in zip(ranks, found, strict=True):
            _tally_laws(ids[0], rank, hot, single, together)
    for single, hot, together in found:
        first, second = np.triu_indices(len(hot), 1)
        together += single[hot[first]] + single[hot[second]]
    return found


def _tokens(plan: Plan, layer: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    trial = _FIRST_TRIAL + batch * 2**20 + layer
    tokens = np.array([_BATCH_TOKENS])
    return draw_trials(plan.model, plan.workload, plan.seed, range(trial, trial + 1), 2**20, tokens, _BATCH_TOKENS)


@kernel
def _tally_laws(ids, rank, hot, single, together):
    """Add tokens ids int16 [tokens, top_k] to single int64 [ranks, top_k + 1] and together int64 [pairs, top_k + 1]."""
    load = np.zeros(single.shape[0], np.int64)
    place = np.full(single.shape[0], -1)
    for i in range(hot.size):
        place[hot[i]] = i
    hit, of_hit = np.empty(ids.shape[1], np.int64), np.empty(ids.shape[1], np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            load[rank[ids[t, k]]] += 1
        n_hit = 0
        for k in range(ids.shape[1]):
            r = rank[ids[t, k]]
            if load[r]:
                single[r, load[r]] += 1
                if place[r] >= 0:
                    hit[n_hit], of_hit[n_hit] = place[r], load[r]
                    n_hit += 1
                load[r] = 0
        # A pair of which one rank is hit counts like that rank; `single` adds those, less the tokens that hit both.
        for i in range(n_hit):
            for j in range(i):
                a, b = min(hit[i], hit[j]), max(hit[i], hit[j])
                pair = a * hot.size - a * (a + 1) // 2 + b - a - 1
                together[pair, of_hit[i] + of_hit[j]] += 1
                together[pair, of_hit[i]] -= 1
                together[pair, of_hit[j]] -= 1


def _bounded(counts: np.ndarray, n_tokens: int, log_odds: float, up: bool) -> np.ndarray:
    """Laws above (below) those that were counted, in stochastic order: P(at least j) moved to its bound."""
    at_least = np.cumsum(counts[..., :0:-1], axis=-1)[..., ::-1]
    bound = np.empty(at_least.shape)
    _fill_bounds(at_least.reshape(-1), n_tokens, log_odds, up, bound.reshape(-1))
    bound = np.concatenate([np.ones((*bound.shape[:-1], 1)), bound, np.zeros((*bound.shape[:-1], 1))], axis=-1)
    return bound[..., :-1] - bound[..., 1:]


@kernel
def _fill_bounds(hits, n, log_odds, up, out):
    """Chernoff's bound of a probability seen in `hits` of n tokens, wrong with probability exp(-log_odds) at most."""
    for i in range(hits.size):
        p = hits[i] / n
        variance = p if up else 1 - p
        reach = np.sqrt(2 * variance * log_odds / n) + 2 * log_odds / n  # not less than the bound is away
        inside, outside = p, min(p + reach, 1.0) if up else max(p - reach, 0.0)
        if inside == outside:
            out[i] = p
            continue
        for _ in range(24):
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
        out[i] = outside
